"""Moments at a refresh: carried into the new subspace, or reset."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from ..functional import BLOCK, CARRIED, Noise, on_device, row_chunks
from ..parts.plan import Plan
from ..parts.storage import load_moments, moments_of, rows_of, shape_of, store_moments, stored
from ..parts.types import Group, Job, Site, State, site_of, stream_and_height
from .adaptive_rank import padded


class Moved(NamedTuple):
    """A parameter whose subspace has moved: what its projector kept before, and keeps now.

    `rotates` says whether its moments rotate with the subspace; if not, the first columns stay.
    """

    job: Job
    old: State
    new: State
    rotates: bool


def carry(moved: list[Moved], group: Group, plan: Plan) -> None:
    """Carry moments into subspaces that have moved, in place; the parameters are `alike`."""
    ages: dict[int | None, list[Moved]] = {}
    for each in moved:
        ages.setdefault(None if group["capturable"] else site_of(each.job).step, []).append(each)
    for some in ages.values():
        if not carry_columns(some, group, plan):
            for each in some:
                carry_rows(each, group, plan)


def carry_columns(moved: list[Moved], group: Group, plan: Plan) -> bool:
    """Move columns of moments in place, if nothing else has to be done; return whether it was so.

    Only for subsets of one basis whose moments are all in 8 bits, of parameters of one age.
    """
    held = [moments_of(each.job.state, plan.slots) for each in moved]
    eight = [[x for x in some.values() if not isinstance(x, Tensor)] for some in held]
    if not all(
        each.rotates
        and len(some) == len(plan.slots)
        and some[0][0].shape[-1] == site_of(each.job).rank
        for each, some in zip(moved, eight, strict=True)
    ):
        return False
    places = plan.projector.places([each.old for each in moved], [each.new for each in moved])
    if places is None:
        return False
    noises = [noise_before(each.job, group) for each in moved]
    ops = site_of(moved[0].job).ops
    with on_device(places.device):
        for place, slot in enumerate(plan.slots):
            moments, square = [some[place] for some in eight], slot in plan.rule.squares
            ops.move_columns(moments, places, square, noises, CARRIED[place])
    return True


def carry_rows(moved: Moved, group: Group, plan: Plan) -> None:
    """Carry the moments of one parameter, some rows at a time, in place.

    The rank may have changed. Columns that either subspace lacks then count as zero, and the state
    gets new moments.
    """
    job, old, new, rotates = moved
    site, rule, noise = site_of(job), plan.rule, noise_before(job, group)
    held = kept = moments_of(job.state, plan.slots)
    *batch, count, rank = shape_of(job.state, plan.slots[0])
    most = max(rank, site.rank)
    if rank != site.rank:
        for slot in plan.slots:
            shape = (*batch, count, site.rank)
            job.state.update(plan.storage.zeros(slot, shape, job.param))
        kept = moments_of(job.state, plan.slots)
        old, new = (
            {key: padded(state[key], most, site.cols * far) for key in plan.projector.keys}
            for far, state in ((1, old), (2, new))
        )
    ops = site.ops
    filled = -(-most // BLOCK) * BLOCK  # what a row in 8 bits is filled up to
    for rows in row_chunks(count, filled * prod(batch)):
        some = {slot: rows_of(moment, rows) for slot, moment in held.items()}
        moments = load_moments(some, rule, site.dtype, ops)
        if rank != site.rank:
            moments = {slot: pad(moment, (0, most - rank)) for slot, moment in moments.items()}
        if rotates:
            plan.projector.transport(rule, moments, old, new, site, group)
        here = noise._replace(stream=noise.stream + rows.start)
        moments = {slot: moment[..., : site.rank] for slot, moment in moments.items()}
        some = {slot: rows_of(moment, rows) for slot, moment in kept.items()}
        store_moments(some, moments, rule, here, carried=True, ops=ops)
        if job.param.is_meta and rows.start:
            break  # no values: the other pieces show nothing new


def reset(job: Job, plan: Plan, site: Site) -> None:
    """Zero the moments and their age, and give them the width of the subspace."""
    state = job.state
    state["age"].zero_()
    width = plan.projector.width(site)
    for slot in plan.slots:
        shape = shape_of(state, slot)
        if shape[-1] != width:
            wanted = (*shape[:-1], width)
            state.update(plan.storage.zeros(slot, wanted, job.param))
            continue
        moment = stored(state, slot)
        for piece in (moment,) if isinstance(moment, Tensor) else moment:
            piece.zero_()


def noise_before(job: Job, group: Group) -> Noise:
    """Return the source of random bits for what happens between two steps of a parameter."""
    step = job.state["step"] if group["capturable"] else site_of(job).step
    return Noise(group["seed"], step, *stream_and_height(job))
