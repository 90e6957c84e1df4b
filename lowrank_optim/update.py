"""One step of a group's parameters: project, moments, residual, write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import dispatch, fused
from .functional import (
    NEAR,
    WEIGHT,
    Norms,
    bits_of,
    compute_dtype,
    down,
    lift_write,
    round_into_,
    row_chunks,
    row_norms,
)
from .geometry import oriented
from .plan import Group, Job, Plan, Site, State
from .rates import age_of, noise_of, rates_of, rounds
from .storage import load_moments, moments_of, store_moments
from .subspace import move_subspaces


def init_state(param: Tensor, site: Site | None, group: Group, plan: Plan) -> State:
    """Return a new state, on the device of `param`."""
    counter = step_device(param, site, group, plan)
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=counter)}
    slots, storage = plan.rule.slots, plan.storage
    if site is None:
        for slot in slots:
            state.update(storage.zeros(slot, tuple(param.shape), param, True))
        return state
    _, view = oriented(param, plan.side)
    batch, rows = tuple(view.shape[:-2]), view.shape[-2]
    for slot in slots:
        shape = (*batch, rows, plan.projector.width(site))
        state.update(storage.zeros(slot, shape, param, False))
    if plan.on_refresh == "reset":
        state["age"] = torch.zeros_like(state["step"])
    if plan.projector.learns:
        state["pending"] = 1
        state["unset"] = torch.ones(batch, dtype=torch.bool, device=param.device)
    state.update(plan.projector.init(batch, storage.dtype(param), site))
    state.update(plan.residual.init(batch, site))
    return state


def step_device(param: Tensor, site: Site | None, group: Group, plan: Plan) -> torch.device:
    """Return where the counts live: with the host, but where a kernel or a graph reads them."""
    host = torch.device("meta" if param.device.type == "meta" else "cpu")
    if group["capturable"]:
        return param.device
    if site is None and plan.rule.counts_on_device(param, plan.storage.dtype(param), group):
        return param.device
    return host


def template(param: Tensor, site: Site | None, group: Group, plan: Plan) -> State:
    """Return what `init_state` would, on the "meta" device: keys, shapes and dtypes for nothing."""
    meta = torch.device("meta")
    site = None if site is None else replace(site, device=meta)
    return init_state(torch.empty_like(param, device=meta), site, group, plan)


def step_projected(jobs: list[Job], group: Group, plan: Plan) -> list[State]:
    """Do one step of projected parameters, in place; return states that may lack a subspace."""
    waiting = move_subspaces([job for job in jobs if job.low is None], group, plan)
    count(jobs)
    with_kernels, others = divided(jobs, group, plan)
    for job in others:
        step_eagerly(job, group, plan)
    if with_kernels:
        fused.step_projected(with_kernels, group, plan)
    return waiting


def project(job: Job, group: Group, plan: Plan) -> tuple[Tensor, list[State]]:
    """Return the projected gradient of a job that has none yet, after its subspace has moved.

    With it comes its state if that may lack a subspace. Where `job.low` is given, the gradient is
    added to that, in the same subspace.
    """
    assert job.site is not None
    waiting = [] if job.low is not None else move_subspaces([job], group, plan)
    _, grad = oriented(job.grad, plan.side)
    low = down(grad, plan.projector.factor(job.state, job.site), job.site.dtype)
    return (low if job.low is None else job.low.add_(low)), waiting


def count(jobs: list[Job]) -> None:
    """Count the update of some parameters."""
    counts = [job.state[key] for job in jobs for key in ("step", "age") if key in job.state]
    if counts:
        torch._foreach_add_(counts, 1)


def divided(jobs: list[Job], group: Group, plan: Plan) -> tuple[list[Job], list[Job]]:
    """Return the jobs that kernels do, and those that plain torch does."""
    with_kernels: list[Job] = []
    others: list[Job] = []
    for job in jobs:
        projected = job.site is not None
        by_kernels = job.low is None and (
            dispatch.refusal(plan, group, job.param, job.grad, job.state, projected) is None
        )
        (with_kernels if by_kernels else others).append(job)
    return with_kernels, others


def step_eagerly(job: Job, group: Group, plan: Plan) -> None:
    """Do one step of a projected parameter whose subspace is in place, in plain torch."""
    param, state, site, rule = job.param, job.state, job.site, plan.rule
    assert site is not None
    matrix, view = oriented(param, plan.side)
    _, grad = oriented(job.grad, plan.side)
    factor = plan.projector.factor(state, site)
    noise, count = noise_of(job, group), age_of(job, group)
    low = down(grad, factor, site.dtype) if job.low is None else job.low

    held = moments_of(state, rule)
    moments = load_moments(held, rule, site.dtype)
    direction = rule.direction(low, moments, count, group)
    store_moments(held, moments, rule, noise)

    want = plan.residual.want
    norms = None
    if want.norms:
        norms = Norms(*(row_norms(x, site.dtype) for x in (grad, low, direction)))
    uncorrected = rule.uncorrected(count, group)
    update = plan.residual.update(norms, state, low.shape[-1], group, uncorrected)
    update = replace(update, low=in_list(update.low), grad=in_list(update.grad))
    step_size, decay = rates_of(group)
    lift_write(
        [view],
        [grad],
        [factor],
        low.unsqueeze(0),
        direction.unsqueeze(0),
        update,
        step_size,
        decay,
        [noise] if rounds(param, group) else None,
    )
    if matrix.data_ptr() != param.data_ptr():
        param.copy_(matrix.view(param.shape))


def in_list(factor: Tensor | float) -> Tensor | float:
    """Return a factor of one matrix as that of a list of one."""
    return factor.unsqueeze(0) if isinstance(factor, Tensor) else factor


def step_plain(jobs: list[Job], group: Group, plan: Plan) -> None:
    """Do one step of parameters that are not projected, in place.

    What the rule cannot do whole is done by a kernel, or here in the dtype of the arithmetic, some
    rows at a time.
    """
    undone = plan.rule.step_plain(jobs, group)
    count(undone)
    with_kernels, others = divided(undone, group, plan)
    for job in others:
        step_plain_eagerly(job, group, plan)
    if with_kernels:
        fused.step_plain(with_kernels, group, plan)


def step_plain_eagerly(job: Job, group: Group, plan: Plan) -> None:
    """Do one step of a parameter that is not projected, in plain torch."""
    param, rule, dtype = job.param, plan.rule, compute_dtype(job.param.dtype)
    noise, count = noise_of(job, group), age_of(job, group)
    step_size, decay = rates_of(group)
    length = param.shape[0] if param.ndim > 1 else 1
    for rows in row_chunks(length, NEAR * (param.numel() // max(1, length))):
        part = rows if param.ndim > 1 else ...
        here = noise._replace(stream=noise.stream + rows.start)
        held = {slot: part_of(moment, part) for slot, moment in moments_of(job.state, rule).items()}
        moments = load_moments(held, rule, dtype)
        direction = rule.direction(job.grad[part].to(dtype), moments, count, group)
        store_moments(held, moments, rule, here, whole=True)
        target = param[part]
        out = target.to(dtype).mul_(decay).add_(direction * step_size)
        round_into_(
            target, out, bits_of(here, WEIGHT, target, True) if rounds(param, group) else None
        )


def part_of(moment: Any, part: Any) -> Any:
    """Return some rows of a stored moment."""
    if isinstance(moment, Tensor):
        return moment[part]
    return tuple(piece[part] for piece in moment)
