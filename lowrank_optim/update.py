"""One parameter's step: orient, refresh, project, moments, residual, write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .functional import compute_dtype, generator, lift_write, round_into_, row_chunks
from .plan import Group, Job, Plan, Site, State
from .rules import wants_fused


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape as a matrix `(m, n)` or a stack `(E, m, n)`; None for fewer dimensions.

    A convolution's weight `(out, in, k, k)`, or one of more dimensions, is `(out, in*k*k)`.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    if len(shape) <= 3:
        return tuple(shape)
    return (shape[0], torch.Size(shape[1:]).numel())


def is_wide(shape: tuple[int, ...], side: str) -> bool:
    """Return whether the matrix is seen transposed, so that the projected axis comes last."""
    rows, cols = shape[-2:]
    if side == "auto":
        return rows < cols
    if side == "reverse":
        return rows >= cols
    return side == "left"


def oriented(tensor: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Return the tensor as a matrix or stack, and its view with the projected axis last.

    The first is a view of the tensor too, unless it is a convolution's weight whose strides do not
    allow that (channels last): then it is a copy.
    """
    matrix = tensor if tensor.ndim <= 3 else tensor.flatten(1)
    return matrix, matrix.mT if is_wide(tuple(matrix.shape), side) else matrix


def site_of(
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    plan: Plan,
) -> Site | None:
    """Return the site of a parameter of this shape, or None where it is not projected.

    Not projected are: a group without rank, fewer than two dimensions, no elements, and a projected
    axis that is no longer than the rank.
    """
    matrix, rank = matrix_shape(shape), group["rank"]
    if matrix is None or rank is None:
        return None
    cols = matrix[-2] if is_wide(matrix, plan.side) else matrix[-1]
    share = rank if isinstance(rank, float) else None
    width = max(1, round(share * cols)) if share is not None else rank
    if width >= cols or (plan.projector.whole and share == 1):
        return None
    return Site(
        rank=width,
        cols=cols,
        dtype=compute_dtype(dtype),
        device=device,
        seed=group["seed"],
        gap=group["update_proj_gap"],
        share=share,
    )


def init_state(param: Tensor, site: Site | None, group: Group, plan: Plan) -> State:
    """Return a new state, on the device of `param`."""
    fused = site is None and wants_fused(param, group)
    counter = param.device if fused or param.device.type == "meta" else "cpu"
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
    state.update(plan.projector.init(batch, storage.dtype(param), site))
    state.update(plan.residual.init(batch, site))
    return state


def template(param: Tensor, site: Site | None, group: Group, plan: Plan) -> State:
    """Return what `init_state` would, on the "meta" device: keys, shapes and dtypes for nothing."""
    meta = torch.device("meta")
    site = None if site is None else replace(site, device=meta)
    return init_state(torch.empty_like(param, device=meta), site, group, plan)


def step_projected(job: Job, group: Group, plan: Plan) -> None:
    """Do one step of a projected parameter, in place."""
    param, grad, state = job.param, job.grad, job.state
    assert job.site is not None
    done, lr = int(state["step"]), rate_of(group)
    site = replace(job.site, step=done)
    matrix, view = oriented(param, plan.side)
    _, grad = oriented(grad, plan.side)
    low = refresh(grad, state, site, group, plan) if is_due(state, site, plan) else None
    if low is None:
        low = plan.projector.down(grad, state, site)
    state["step"] += 1
    count = done % site.gap + 1 if plan.on_refresh == "reset" else done + 1

    moments = {slot: plan.storage.load(state[slot], site.dtype) for slot in plan.rule.slots}
    direction = plan.rule.direction(low, moments, count, group)
    for slot, value in moments.items():
        plan.storage.store(state[slot], value)

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
        rng=rounding_of(param, done, group, job.position),
    )
    if matrix.data_ptr() != param.data_ptr():
        param.copy_(matrix.view(param.shape))


def rate_of(group: Group) -> float | Tensor:
    """Return the learning rate as a number or a 0-d tensor."""
    lr: float | Tensor = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def is_due(state: State, site: Site, plan: Plan) -> bool:
    """Return whether the subspace moves now: every `gap` updates, and when a block's turn ends."""
    moment: Tensor = state[plan.rule.slots[0]]
    return site.step % site.gap == 0 or moment.shape[-1] != plan.projector.width(site)


def refresh(grad: Tensor, state: State, site: Site, group: Group, plan: Plan) -> Tensor | None:
    """Move the subspace and what depends on it, in place; return `low` if it came out."""
    projector, storage = plan.projector, plan.storage
    carries = plan.on_refresh in ("rotate", "align") and site.step > 0
    before = snapshot(state, projector.keys) if carries else {}
    low = projector.refresh(grad, state, site)
    if plan.on_refresh == "reset":
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
            storage.store(state[slot], value)
    return low


def snapshot(state: State, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return copies of some entries of a state."""
    return {
        key: state[key].clone() if isinstance(state[key], Tensor) else state[key] for key in keys
    }


def rounding_of(param: Tensor, step: int, group: Group, position: int) -> torch.Generator | None:
    """Return the generator for stochastic rounding of this step, or None where it is off."""
    if not group["stochastic_rounding"] or param.dtype != torch.bfloat16:
        return None
    return generator(param.device, group["seed"], step, position)


def step_plain(jobs: list[Job], group: Group, plan: Plan) -> None:
    """Do one step of parameters that are not projected, in place.

    What the rule cannot do whole is done here in the dtype of the arithmetic, some rows at a time.
    """
    lr = rate_of(group)
    step_size, decay = lr if group["maximize"] else -lr, 1 - lr * group["weight_decay"]
    for param, grad, state, _, position in plan.rule.step_plain(jobs, group):
        done, dtype = int(state["step"]), compute_dtype(param.dtype)
        state["step"] += 1
        rng = rounding_of(param, done, group, position)
        flat = param.ndim == 0
        length = 1 if flat else param.shape[0]
        for rows in row_chunks(length, param.numel() // max(1, length)):
            part: slice | None = None if flat else rows
            stored = {slot: state[slot][part] for slot in plan.rule.slots}
            moments = {slot: plan.storage.load(x, dtype) for slot, x in stored.items()}
            direction = plan.rule.direction(grad[part].to(dtype), moments, done + 1, group)
            for slot, value in moments.items():
                plan.storage.store(stored[slot], value)
            target = param[part]
            out = target.to(dtype)
            round_into_(target, out.mul_(decay).add_(direction.mul_(step_size)), rng)
