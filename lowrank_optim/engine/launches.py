"""Launches of the kernels that do a step: many matrices of one shape in each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import Noise, Stored, has_rest, is_index, on_device, update_squares
from ..functional.factors import oriented
from ..parts.plan import Plan
from ..parts.storage import stored
from ..parts.types import (
    Group,
    Job,
    age_of,
    in_rows,
    moment_in_rows,
    noise_of,
    rates_of,
    rounds,
    site_of,
)
from .backend import kernels
from .length import Sums, settled
from .two_phase import Half

AT_ONCE = 48 << 20
"""Bytes of projected gradients, directions and bases that a step makes beside the parameters."""

SHARE = 64
"""A step may make the bytes of the gradients over this, where that is more. Otherwise a large
model's step has many small launches, and takes as long as the host needs for them."""

READ_OFTEN = 1 << 18
"""Elements from which on a basis is narrowed once instead of at each of its many reads."""


class Operand(NamedTuple):
    """One matrix of one parameter: all that a launch is given of it, except its factor.

    The factor may have to be computed, and is asked for just before its launch. Where the matrix
    cannot be a view of the parameter (channels last), `param` is a view of `copy`.
    """

    job: Job
    place: int | None
    param: Tensor
    copy: Tensor | None
    grad: Tensor
    exp_avg: Stored
    exp_avg_sq: Stored
    age: int | Tensor
    noise: Noise
    residual: dict[str, Tensor]
    sampled: Tensor | None


class PlainOperand(NamedTuple):
    """One parameter that is not projected."""

    param: Tensor
    grad: Tensor
    exp_avg: Stored
    exp_avg_sq: Stored
    age: int | Tensor
    noise: Noise


def begin(jobs: list[Job], group: Group, plan: Plan) -> Iterator[Half]:
    """Do the first half of a step of projected parameters whose subspaces are in place."""
    operands: dict[Hashable, list[Operand]] = {}
    for job in jobs:
        matrix, view = oriented(job.param, job.layout.wide)
        copy = matrix if matrix.data_ptr() != job.param.data_ptr() else None
        for operand in operands_of(job, view, copy, group, plan):
            operands.setdefault(launch_of(operand), []).append(operand)
    room = at_once(jobs)
    for alike in operands.values():
        operand = alike[0]
        size = held_bytes(operand, plan)
        for together in chunks(alike, max(1, room // max(1, size))):
            with on_device(operand.param.device):
                yield launch(together, group, plan)


def at_once(jobs: list[Job]) -> int:
    """Return the bytes that a launch for some of these parameters may make."""
    total = 0
    for job in jobs:
        layout = job.layout
        values = layout.matrices * layout.rows * layout.cols // layout.team.size
        total += values * job.param.element_size()
    return max(AT_ONCE, total // SHARE)


def operands_of(
    job: Job, view: Tensor, copy: Tensor | None, group: Group, plan: Plan
) -> Iterator[Operand]:
    """Yield the matrices of a parameter, which is one matrix or a stack of them."""
    assert job.site is not None
    _, grad = oriented(job.grad, job.layout.wide)
    states = job.state
    moments = [states[slot] if slot in states else stored(states, slot) for slot in plan.slots]
    residual = {key: job.state[key] for key in (*plan.kept, *plan.kept_by_row)}
    count, noise = age_of(job, group), noise_of(job, group)
    first, second = moments
    if view.ndim == 2:
        yield Operand(
            job, None, view, copy, grad, first, second, count, noise, residual, job.sampled
        )  # fmt: skip
        return
    for place in range(view.shape[0]):
        yield Operand(
            job,
            place,
            view[place],
            None,
            grad[place],
            piece_of(first, place),
            piece_of(second, place),
            count,
            noise._replace(stream=noise.stream + place * job.layout.rows),
            {key: value[place] for key, value in residual.items()},
            None if job.sampled is None else job.sampled[place],
        )


def piece_of(moment: Stored, place: int) -> Stored:
    """Return the moment of one matrix of a stack."""
    if isinstance(moment, Tensor):
        return moment[place]
    return moment[0][place], moment[1][place]


def launch_of(operand: Operand) -> Hashable:
    """Return the key by which matrices share a launch; sharded ones share it on all processes."""
    tensors, site = (operand.param, operand.grad), operand.job.site
    assert site is not None
    counted = None if isinstance(operand.age, Tensor) else (operand.age, operand.noise.step)
    layout = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
    forms = (form_of(operand.exp_avg), form_of(operand.exp_avg_sq))
    cut = None if operand.job.layout.mesh is None else operand.job.layout
    return (cut, layout, forms, site.rank, operand.param.device, counted)


def form_of(moment: Stored) -> Hashable:
    """Return how a moment lies in memory."""
    return moment.dtype if isinstance(moment, Tensor) else "8bit"


def held_bytes(operand: Operand, plan: Plan) -> int:
    """Return the bytes that a launch makes for one matrix: low, direction, sums, and a basis.

    A whole basis in the state is used as it lies there, or narrowed. Any other basis is counted as
    if it were gathered in float32 and narrowed.
    """
    want, (rows, cols), layout = plan.want, operand.param.shape, operand.job.layout
    if layout.mesh is not None:
        rows = -(-layout.rows // layout.team.size)  # the same number on all processes
    width = 2 if operand.grad.dtype == torch.bfloat16 else 4
    values = width * (want.low + want.direction) + 4 * (form_of(operand.exp_avg) == "8bit")
    made = 6
    for key in plan.projector.bases:
        basis = operand.job.state[key]
        if basis.shape[-2] == cols:
            made = 0 if basis.dtype == operand.grad.dtype else width
    return site_of(operand.job).rank * (rows * values + made * cols)


def factors_of(operands: list[Operand], plan: Plan) -> list[Tensor]:
    """Return the factors of some matrices, alike in their strides."""
    made: dict[int, Tensor] = {}
    factors = []
    for job, place, _, _, grad, *_ in operands:
        factor = made.get(job.position)
        if factor is None:
            chosen = plan.projector.factor(job.state, site_of(job))
            assert isinstance(chosen, Tensor)  # what is projected whole has no launches
            factor = chosen
            if not is_index(factor) and factor.numel() >= READ_OFTEN:
                factor = factor.to(grad.dtype)
            made[job.position] = factor
        of_stack = place is not None and not is_index(factor) and factor.ndim == 3
        factors.append(factor[place] if of_stack else factor)
    if any(factor.stride() != factors[0].stride() for factor in factors):
        return [factor.contiguous() for factor in factors]
    return factors


def chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Yield pieces of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def launch(operands: list[Operand], group: Group, plan: Plan) -> Half:
    """Do the first launch for some matrices, and return the second, which needs the residual."""
    site = operands[0].job.site
    assert site is not None
    ops, want, length = site.ops, plan.want, plan.length
    grads, factors = [operand.grad for operand in operands], factors_of(operands, plan)
    state = {
        key: torch.stack([operand.residual[key] for operand in operands])
        for key in operands[0].residual
    }
    inside = length.inside(group) if length.measured else group
    known = None if want.norms else plan.residual.update(None, state, site, inside)
    norms_of_rest = known is not None and length.measured and has_rest(known) and not known.sign
    noises, counts = [operand.noise for operand in operands], [operand.age for operand in operands]
    low, direction, norms = ops.project_moments(
        grads,
        factors,
        [operand.exp_avg for operand in operands],
        [operand.exp_avg_sq for operand in operands],
        counts,
        *group["betas"],
        group["eps"],
        noises,
        want._replace(norms=want.norms or norms_of_rest),
    )
    count = (
        counts[0] if isinstance(counts[0], int) else torch.stack(list(map(torch.as_tensor, counts)))
    )
    limiting = plan.residual.sums(norms, state, site, inside) if want.norms else None
    update = known if known is not None else plan.residual.update(norms, state, site, inside)
    sums = None if limiting is None else Sums(limiting)
    if length.measured:
        squares = update_squares(grads, factors, low, direction, update, norms, ops.sign_squares)
        samples = [operand.sampled for operand in operands if operand.sampled is not None]
        sums = Sums(limiting, squares, torch.stack(samples) if samples else None)

    def finish(total: Tensor | None) -> None:
        written, lengths = update, None
        if sums is not None and total is not None:
            found = sums.split(total)
            written, lengths = settled(found, update, state, site, count, group, plan)
        for key, value in state.items():
            torch._foreach_copy_(
                [operand.residual[key] for operand in operands], list(value.unbind())
            )
        param = operands[0].param
        with on_device(param.device):
            ops.lift_write(
                [operand.param for operand in operands],
                grads,
                factors,
                low,
                direction,
                written,
                *rates_of(group),
                noises if rounds(param, group) else None,
                lengths,
            )
        for operand in operands:
            if operand.copy is not None:
                operand.job.param.copy_(operand.copy.view(operand.job.param.shape))

    places = [(operand.job, operand.place or 0) for operand in operands]
    return Half(places, None if sums is None else sums.joined(), finish)


def step_plain(jobs: list[Job], group: Group, plan: Plan) -> None:
    """Do one step of parameters that are not projected."""
    operands: dict[Hashable, list[PlainOperand]] = {}
    for job in jobs:
        count, noise = age_of(job, group), noise_of(job, group)
        counted = None if isinstance(count, Tensor) else (count, noise.step)
        exp_avg, exp_avg_sq = (stored(job.state, slot) for slot in plan.rule.plain.slots)
        param, grad, forms = job.param, job.grad, (form_of(exp_avg), form_of(exp_avg_sq))
        if rounds(param, group) or forms != (torch.float32, torch.float32):
            param, grad = in_rows(param), in_rows(grad)
            exp_avg, exp_avg_sq = moment_in_rows(exp_avg), moment_in_rows(exp_avg_sq)
        kind = (param.shape, param.dtype, grad.dtype, param.device, forms, counted)
        operand = PlainOperand(param, grad, exp_avg, exp_avg_sq, count, noise)
        operands.setdefault(kind, []).append(operand)
    for alike in operands.values():
        params, grads, firsts, seconds, counts, noises = map(list, zip(*alike, strict=True))
        with on_device(alike[0].param.device):
            kernels().adam_step(
                params,
                grads,
                firsts,
                seconds,
                counts,
                *group["betas"],
                group["eps"],
                *rates_of(group),
                noises,
                group["stochastic_rounding"],
            )
