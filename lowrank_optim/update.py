"""One parameter's step: orient, refresh, project, moments, residual, write."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .functional import (
    compute_dtype,
    generator,
    lift_write,
    peaks,
    round_into_,
    row_chunks,
    usable,
)
from .geometry import oriented
from .plan import Draw, Group, Job, Matrix, Plan, Site, State


def init_state(param: Tensor, site: Site | None, group: Group, plan: Plan) -> State:
    """Return a new state, on the device of `param`."""
    counter = step_device(param, site, group, plan)
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=counter)}
    slots, storage = plan.rule.slots, plan.storage
    if site is None:
        for slot in slots:
            zeros = storage.zeros(param, tuple(param.shape))
            state[slot] = torch.empty_like(param, dtype=zeros.dtype).copy_(zeros)
        return state
    _, view = oriented(param, plan.side)
    batch, rows = tuple(view.shape[:-2]), view.shape[-2]
    for slot in slots:
        state[slot] = storage.zeros(param, (*batch, rows, plan.projector.width(site)))
    if plan.on_refresh == "reset":
        state["age"] = 0
    if plan.projector.learns:
        state["pending"] = torch.Size(batch).numel()
    state.update(plan.projector.init(batch, storage.dtype(param), site))
    state.update(plan.residual.init(batch, site))
    return state


def step_device(param: Tensor, site: Site | None, group: Group, plan: Plan) -> torch.device:
    """Return where the step count lives: with the host, but where a fused kernel reads it."""
    host = torch.device("meta" if param.device.type == "meta" else "cpu")
    if site is None and plan.rule.counts_on_device(param, plan.storage.dtype(param), group):
        return param.device
    return host


def template(param: Tensor, site: Site | None, group: Group, plan: Plan) -> State:
    """Return what `init_state` would, on the "meta" device: keys, shapes and dtypes for nothing."""
    meta = torch.device("meta")
    site = None if site is None else replace(site, device=meta)
    return init_state(torch.empty_like(param, device=meta), site, group, plan)


def step_projected(job: Job, group: Group, plan: Plan) -> None:
    """Do one step of a projected parameter, in place."""
    param, state, site = job.param, job.state, job.site
    assert site is not None
    lr, draw = rate_of(group), generator_of(param, site.step, group, job.position)
    matrix, view = oriented(param, plan.side)
    _, grad = oriented(job.grad, plan.side)
    low = refresh(grad, state, site, group, plan, draw)
    if low is None:
        low = plan.projector.down(grad, state, site)
    state["step"] += 1
    count = site.step + 1
    if plan.on_refresh == "reset":
        state["age"] = count = state["age"] + 1

    moments = {slot: plan.storage.load(state[slot], site.dtype) for slot in plan.rule.slots}
    direction = plan.rule.direction(low, moments, count, group)
    for slot, value in moments.items():
        plan.storage.store(state[slot], value, draw)

    uncorrected = plan.rule.uncorrected(count, group)
    update = plan.residual.update(grad, low, direction, state, group, uncorrected)
    lift_write(
        view,
        grad,
        step_size=lr if group["maximize"] else -lr,
        decay=1 - lr * group["weight_decay"],
        low=update.low,
        row_scale=update.row_scale,
        sign=update.sign,
        projected=low if update.sign else None,
        lift_=lambda out, part: plan.projector.lift_(out, part, state, site),
        rng=draw() if rounds(param, group) else None,
    )
    if matrix.data_ptr() != param.data_ptr():
        param.copy_(matrix.view(param.shape))


def rate_of(group: Group) -> float | Tensor:
    """Return the learning rate as a number or a 0-d tensor."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def refresh(
    grad: Tensor, state: State, site: Site, group: Group, plan: Plan, draw: Draw
) -> Tensor | None:
    """Move the subspace if it is time, and what depends on it; return `low` if it came out.

    It is time every `gap` updates, when a block's turn ends, and, for matrices that have not had a
    usable gradient yet (zero-initialised layers, experts that no token has reached), as soon as
    they have one. Only these are looked for on the host, while `pending` counts any.
    """
    projector, rule = plan.projector, plan.rule
    first: Tensor = state[rule.slots[0]]
    arrived = None
    if state.get("pending"):
        unset, good = peaks(first) == 0, usable(grad)
        state["pending"] = int((unset & ~good).sum())
        arrived = unset & good
    if site.step % site.gap == 0 or first.shape[-1] != projector.width(site):
        return move(grad, state, site, group, plan, draw)
    if arrived is not None and arrived.any():
        projector.refresh([Matrix(grad, state, replace(site, wanted=arrived))])
    return None


def move(
    grad: Tensor, state: State, site: Site, group: Group, plan: Plan, draw: Draw
) -> Tensor | None:
    """Move the subspace and do with the moments what `on_refresh` says, in place."""
    projector, storage = plan.projector, plan.storage
    carries = plan.on_refresh in ("rotate", "align") and site.step > 0
    before = snapshot(state, projector.keys) if carries else {}
    projector.refresh([Matrix(grad, state, site)])
    low = None
    if plan.on_refresh == "reset":
        state["age"] = 0
        width = projector.width(site)
        for slot in plan.rule.slots:
            moment: Tensor = state[slot]
            if moment.shape[-1] == width:
                moment.zero_()
            else:
                state[slot] = storage.zeros(moment, (*moment.shape[:-1], width))
    elif carries and plan.on_refresh == "align":
        projector.align(before, state)
        low = None
    elif carries:
        moments = {slot: storage.load(state[slot], site.dtype) for slot in plan.rule.slots}
        projector.transport(plan.rule, moments, before, state, site, group)
        for slot, value in moments.items():
            storage.store(state[slot], value, draw)
    return low


def snapshot(state: State, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return copies of some entries of a state."""
    return {
        key: state[key].clone() if isinstance(state[key], Tensor) else state[key] for key in keys
    }


def rounds(param: Tensor, group: Group) -> bool:
    """Return whether the weight is rounded stochastically."""
    return group["stochastic_rounding"] and param.dtype == torch.bfloat16


def generator_of(param: Tensor, step: int, group: Group, position: int) -> Draw:
    """Return what gives the generator of one parameter's step, made when first asked for."""
    return cache(lambda: generator(param.device, group["seed"], step, position))


def step_plain(jobs: list[Job], group: Group, plan: Plan) -> None:
    """Do one step of parameters that are not projected, in place.

    What the rule cannot do whole is done here in the dtype of the arithmetic, some rows at a time.
    """
    lr = rate_of(group)
    step_size, decay = lr if group["maximize"] else -lr, 1 - lr * group["weight_decay"]
    for param, grad, state, _, position in plan.rule.step_plain(jobs, group):
        done, dtype = int(state["step"]), compute_dtype(param.dtype)
        state["step"] += 1
        draw = generator_of(param, done, group, position)
        flat = param.ndim == 0
        length = 1 if flat else param.shape[0]
        for rows in row_chunks(length, param.numel() // max(1, length)):
            part: slice | None = None if flat else rows
            stored = {slot: state[slot][part] for slot in plan.rule.slots}
            moments = {slot: plan.storage.load(x, dtype) for slot, x in stored.items()}
            direction = plan.rule.direction(grad[part].to(dtype), moments, done + 1, group)
            for slot, value in moments.items():
                plan.storage.store(stored[slot], value, draw)
            target = param[part]
            out = target.to(dtype)
            rng = draw() if rounds(param, group) else None
            round_into_(target, out.mul_(decay).add_(direction * step_size), rng)
