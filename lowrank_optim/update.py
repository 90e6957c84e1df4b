"""One step of a group's parameters: project, moments, residual, write."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import dispatch, fused
from .distributed import Layout
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
from .halves import Half, portions, run
from .plan import Group, Job, Plan, Site, State
from .rates import age_of, in_rows, moment_in_rows, noise_of, rates_of, rounds
from .storage import load_moments, moments_of, store_moments
from .subspace import Waiting, move_subspaces


def init_state(
    param: Tensor, site: Site | None, group: Group, plan: Plan, size: int | None = None
) -> State:
    """Return a new state, on the device of `param`.

    Args:
        param: the parameter, or what a process holds of it.
        site, group, plan: its own.
        size: elements of the whole parameter, if that is more.
    """
    size = param.numel() if size is None else size
    counter = step_device(param, site, group, plan)
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=counter)}
    slots, storage = plan.rule.slots, plan.storage
    if site is None:
        for slot in slots:
            state.update(storage.zeros(slot, tuple(param.shape), param, size or 1))
        return state
    _, view = oriented(param, site.layout.wide)
    batch, rows = tuple(view.shape[:-2]), view.shape[-2]
    for slot in slots:
        shape = (*batch, rows, plan.projector.width(site))
        state.update(storage.zeros(slot, shape, param))
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


def template(
    param: Tensor, site: Site | None, group: Group, plan: Plan, held: Layout | None = None
) -> State:
    """Return what `init_state` would, on the "meta" device: keys, shapes and dtypes for nothing.

    That is the state of the whole parameter, or of what a process holds of it, by its layout.
    """
    meta = torch.device("meta")
    site = None if site is None else replace(site, device=meta)
    if held is None or held.mesh is None:
        like = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=meta)
    else:
        like = torch.empty(held.held, dtype=param.dtype, device=meta)
    state = init_state(like, site, group, plan, param.numel())
    if site is not None and held is not None and held.mesh is not None:
        for key in plan.each(group).cut:
            state[key] = held.columns_of(state[key])
    return state


def step_projected(jobs: list[Job], group: Group, plan: Plan) -> list[Waiting]:
    """Do one step of projected parameters, in place; return which may lack a subspace."""
    waiting = move_subspaces([job for job in jobs if job.low is None], group, plan)
    count(jobs)
    for some in portions(jobs, group, plan):
        with_kernels, others = divided(some, group, plan)
        eager = (begin_eagerly(job, group, plan) for job in others)
        run(chain(eager, fused.begin(with_kernels, group, plan)))
    return waiting


def project(job: Job, group: Group, plan: Plan) -> tuple[Tensor, list[Waiting]]:
    """Return the projected gradient of a job that has none yet, after its subspace has moved.

    With it comes its state if that may lack a subspace. Where `job.low` is given, the gradient is
    added to that, in the same subspace.
    """
    assert job.site is not None
    waiting = [] if job.low is not None else move_subspaces([job], group, plan)
    _, grad = oriented(job.grad, job.layout.wide)
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
        by_kernels = (
            job.low is None
            and job.param.numel() > 0
            and job.layout.reaches_all
            and (dispatch.refusal(plan, group, job.param, job.grad, job.state, projected) is None)
        )
        (with_kernels if by_kernels else others).append(job)
    return with_kernels, others


def begin_eagerly(job: Job, group: Group, plan: Plan) -> Half:
    """Do the first half of a step of a parameter whose subspace is in place, in plain torch."""
    state, site, rule, want = job.state, job.site, plan.rule, plan.residual.want
    assert site is not None
    _, grad = oriented(job.grad, job.layout.wide)
    factor = plan.projector.factor(state, site)
    noise, count = noise_of(job, group), age_of(job, group)
    low = down(grad, factor, site.dtype) if job.low is None else job.low

    held = moments_of(state, rule)
    moments = load_moments(held, rule, site.dtype)
    direction = rule.direction(low, moments, count, group)
    store_moments(held, moments, rule, noise)

    norms = None
    if want.norms:
        norms = Norms(*(row_norms(x, site.dtype) for x in (grad, low, direction)))
    rank = low.shape[-1]
    kept = low.unsqueeze(0) if want.low else None
    moved = direction.unsqueeze(0) if want.direction else None
    del low, direction

    def finish(sums: Tensor | None) -> None:
        uncorrected = rule.uncorrected(count, group)
        if sums is not None and grad.ndim == 2:
            sums = sums[0]
        update = plan.residual.update(norms, sums, state, rank, group, uncorrected)
        update = replace(update, low=in_list(update.low), grad=in_list(update.grad))
        matrix, view = oriented(job.param, job.layout.wide)
        lift_write(
            [view],
            [grad],
            [factor],
            kept,
            moved,
            update,
            *rates_of(group),
            [noise] if rounds(job.param, group) else None,
        )
        if matrix.data_ptr() != job.param.data_ptr():
            job.param.copy_(matrix.view(job.param.shape))

    sums = plan.residual.sums(norms, rank, group)
    if sums is not None:
        sums = sums.reshape(-1, sums.shape[-1])
    return Half([(job, place) for place in range(grad.shape[:-2].numel())], sums, finish)


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
    param, rule, dtype = in_rows(job.param), plan.rule, compute_dtype(job.param.dtype)
    noise, count = noise_of(job, group), age_of(job, group)
    step_size, decay = rates_of(group)
    grad = in_rows(job.grad)
    stored = {slot: moment_in_rows(moment) for slot, moment in moments_of(job.state, rule).items()}
    length = param.shape[0]
    for rows in row_chunks(length, NEAR * (param.numel() // max(1, length))):
        here = noise._replace(stream=noise.stream + rows.start)
        held = {slot: part_of(moment, rows) for slot, moment in stored.items()}
        moments = load_moments(held, rule, dtype)
        direction = rule.direction(grad[rows].to(dtype), moments, count, group)
        store_moments(held, moments, rule, here, whole=True)
        target = param[rows]
        out = target.to(dtype).mul_(decay).add_(direction * step_size)
        round_into_(
            target, out, bits_of(here, WEIGHT, target, True) if rounds(param, group) else None
        )


def part_of(moment: Any, rows: slice) -> Any:
    """Return some rows of a stored moment."""
    if isinstance(moment, Tensor):
        return moment[rows]
    return tuple(piece[rows] for piece in moment)
