"""One step of parameters that are not projected in plain torch, some rows at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import NEAR, WEIGHT, bits_of, compute_dtype, round_into_, row_chunks
from ..parts.plan import Plan
from ..parts.storage import load_moments, moments_of, store_moments
from ..parts.types import Group, Job, age_of, in_rows, moment_in_rows, noise_of, rates_of, rounds
from .backend import codecs


def step_plain_eagerly(job: Job, group: Group, plan: Plan) -> None:
    """Do one step of a parameter that is not projected, in plain torch."""
    param, rule, dtype = in_rows(job.param), plan.rule.plain, compute_dtype(job.param.dtype)
    noise, count = noise_of(job, group), age_of(job, group)
    step_size, decay = rates_of(group)
    grad = in_rows(job.grad)
    held_here = moments_of(job.state, rule.slots)
    stored = {slot: moment_in_rows(moment) for slot, moment in held_here.items()}
    length, ops = param.shape[0], codecs(plan, group, job.param, job.grad)
    for rows in row_chunks(length, NEAR * (param.numel() // max(1, length))):
        here = noise._replace(stream=noise.stream + rows.start)
        held = {slot: part_of(moment, rows) for slot, moment in stored.items()}
        moments = load_moments(held, rule, dtype, ops)
        direction = rule.direction(grad[rows].to(dtype), moments, count, group)
        store_moments(held, moments, rule, here, plain=True, ops=ops)
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
