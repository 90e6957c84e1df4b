"""The length of updates in a step: AdamW's on a sample, and the factor that gives an update one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..functional import CHUNK, Factor, has_rest, on_device
from ..parts.length import SAMPLE, first_entry
from ..parts.plan import Plan
from ..parts.types import Group, Job, Site, State, Update, site_of
from .refresh import grad_of


def sampled(jobs: list[Job], group: Group, plan: Plan) -> list[Job]:
    """Move the moments of samples, and return jobs with the length of AdamW's step on these.

    Gradients are the ones that AdamW would see, before a feed makes something else of them. The
    step is not counted yet.
    """
    alike: dict[Hashable, list[int]] = {}
    for place, job in enumerate(jobs):
        grad, site = grad_of(job), site_of(job)
        count = None if group["capturable"] else int(job.state["step"])
        laid = (grad.shape, grad.stride(), job.state[f"{SAMPLE}.exp_avg"].shape)
        kind = (laid, grad.dtype, grad.device, site.dtype, site.ops, count)
        alike.setdefault(kind, []).append(place)
    found = list(jobs)
    for places in alike.values():
        some = [jobs[place] for place in places]
        site = site_of(some[0])
        with on_device(site.device):
            squares = site.ops.sample_moments(
                [grad_of(job) for job in some],
                [job.state[f"{SAMPLE}.exp_avg"] for job in some],
                [job.state[f"{SAMPLE}.exp_avg_sq"] for job in some],
                [first_entry(site_of(job)) for job in some],
                [next_count(job, group) for job in some],
                *group["betas"],
                group["eps"],
            )
        for place, square in zip(places, squares.unbind(), strict=True):
            found[place] = jobs[place]._replace(sampled=square)
    return found


def next_count(job: Job, group: Group) -> int | Tensor:
    """Return the number of gradients that the sample has seen, this one included."""
    step: Tensor = job.state["step"]
    return step + 1 if group["capturable"] else int(step) + 1


class Sums(NamedTuple):
    """What a step sums over all rows of each matrix; an entry is None if it is not needed.

    Attributes:
        limiting: of the residual, `(..., k)`, see `Residual.sums`.
        squares: of `update_squares`, `(..., 1)` or `(..., 3)`.
        sampled: of `sampled`, `(...)`.
    """

    limiting: Tensor | None = None
    squares: Tensor | None = None
    sampled: Tensor | None = None

    def joined(self) -> Tensor | None:
        """Return all of them, `(..., k)`, to be summed at once."""
        sampled = None if self.sampled is None else self.sampled[..., None]
        parts = [x for x in (self.limiting, self.squares, sampled) if x is not None]
        return torch.cat(parts, -1) if parts else None

    def split(self, total: Tensor) -> Sums:
        """Return them, summed, from the sum of `joined`."""
        sizes = [0 if x is None else x.shape[-1] for x in (self.limiting, self.squares)]
        sizes.append(total.shape[-1] - sum(sizes))
        limiting, squares, sampled = torch.split(total, sizes, -1)
        return Sums(
            None if self.limiting is None else limiting,
            None if self.squares is None else squares,
            None if self.sampled is None else sampled[..., 0],
        )


def in_list(factor: Tensor | float) -> Tensor | float:
    """Return a factor of one matrix as a factor of a list of one matrix."""
    return factor.unsqueeze(0) if isinstance(factor, Tensor) else factor


def lengths_of(
    squares: Tensor,
    limited: Tensor | float,
    sample: Tensor | None,
    site: Site,
    group: Group,
    plan: Plan,
) -> Tensor:
    """Return the factor of the update of each matrix, `(...)`.

    Args:
        squares: of `update_squares`, summed over all rows.
        limited: t there, a number or `(..., 1, 1)`.
        sample: sum of squares on the whole sample, if there is one.
        site, group, plan: of the matrices.
    """
    total = squares[..., 0]
    if squares.shape[-1] == 3:
        t = limited[..., 0, 0] if isinstance(limited, Tensor) else limited
        total = total + t * (2 * squares[..., 1] + t * squares[..., 2])
    scale: float = group["scale"]
    return plan.length.factor(scale, total.clamp_min(0).sqrt(), sample, site)


def settled(
    sums: Sums,
    update: Update,
    state: State,
    site: Site,
    age: int | Tensor,
    group: Group,
    plan: Plan,
    listed: bool = False,
) -> tuple[Update, Tensor | None]:
    """Return an update with its limit, and the factor of each matrix, where one is measured.

    Args:
        sums: over all rows.
        update: before the limit.
        state, site, age, group, plan: of the matrices.
        listed: whether factors of the update have an axis more, of a list of one.
    """
    limit: Tensor | float = 1.0
    if sums.limiting is not None:
        inside, uncorrected = plan.length.inside(group), plan.rule.uncorrected(age, group)
        limit = plan.residual.limited(sums.limiting, state, site, inside, uncorrected)
        factor = in_list(limit) if listed else limit
        low, grad = (
            part * factor if isinstance(part, Tensor) or part else part
            for part in (update.low, update.grad)
        )
        update = replace(update, low=low, grad=grad)
    if sums.squares is None:
        return update, None
    return update, lengths_of(sums.squares, limit, sums.sampled, site, group, plan)


def is_formed(factor: Factor, update: Update, grad: Tensor) -> TypeGuard[Tensor]:
    """Return whether an update that has to be measured is formed: a small one with a sign."""
    by_basis = isinstance(factor, Tensor) and factor.is_floating_point()
    return bool(update.sign) and by_basis and grad.numel() <= CHUNK and not has_rest(update)
