"""What each method keeps and what its step uses beside, from the real optimizer on "meta"."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..engine import backend, feed, launches, memory, update
from ..engine.refresh import at_a_time, move_subspaces
from ..engine.state import init_state, template
from ..functional import Factor
from ..functional.factors import oriented
from ..methods.record import Method
from ..methods.registry import COMPARED
from ..optimizer import LowRank
from ..parts.plan import Plan
from ..parts.types import Group, Job, site_of
from .trace import Live

MEASURED = 4
"""Matrices whose refresh is run; each further one is taken to need as much as these on average."""


@dataclass(frozen=True)
class Needs:
    """Bytes that an optimizer takes.

    Attributes:
        moments: state that is no basis: moments, scales, counts.
        bases: bases and indices in the state.
        shared: bases that layers share, which are no part of the state.
        workspace: what `step()` makes and drops.
        alone: the same for the step of one parameter, by parameter; empty for methods that have
            no `step_in_backward`.
    """

    moments: int
    bases: int = 0
    shared: int = 0
    workspace: int = 0
    alone: dict[nn.Parameter, int] | None = None

    @property
    def state(self) -> int:
        """The optimizer's `state_bytes` after its first step."""
        return self.moments + self.bases


def needs_of(
    method: Method, model: nn.Module, rank: int | float, state: torch.dtype | str | None
) -> Needs:
    """Return what a method takes to train a model, whose parameters are on "meta".

    AdamW is torch's in its fused form, which CUDA runs without temporaries (`foreach`, torch's
    default, makes one more value a parameter); 8-bit AdamW is bitsandbytes' `AdamW8bit`.

    Raises:
        ValueError: nothing would be projected, or a setting is out of its range.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    if method.optimizer is None:
        count = adamw8bit_bytes if method is COMPARED["adamw8bit"] else adamw_bytes
        return Needs(moments=count(params))
    return needs_of_ours(method.build(method.groups(model, rank), state_dtype=state))


def adamw_bytes(params: Iterable[torch.Tensor]) -> int:
    """Return what `torch.optim.AdamW` keeps."""
    return sum(memory.adamw_bytes(param) for param in params)


def adamw8bit_bytes(params: Iterable[torch.Tensor]) -> int:
    """Return what `bitsandbytes.optim.AdamW8bit` keeps.

    Two moments of a byte a value with a float32 a block of 256; below 4096 values, of float32. Two
    maps of 256 float32 are there once for all parameters.
    """
    total, quantized = 0, False
    for param in params:
        size = param.numel()
        quantized |= size >= 4096
        total += 2 * (size + 4 * -(-size // 256)) if size >= 4096 else 8 * size
    return total + 2 * 256 * 4 * quantized


def needs_of_ours(optimizer: LowRank) -> Needs:
    """Return what an optimizer of this package takes, whose parameters are on "meta".

    Its own code says so: state by `predicted_bytes`; a refresh, the change of moments that goes
    with it and shared bases by running them, and launches of kernels by the sizes that `launches`
    cuts them by.
    """
    bases = workspace = 0
    alone: dict[nn.Parameter, int] = {}
    moved: list[tuple[Job, Plan]] = []
    for group, plan, entries in optimizer._session.prepared().groups:
        kinds: dict[Hashable, list[Job]] = {}
        for param, site, layout, _, _, position, _ in entries:
            if not param.requires_grad:
                continue
            assert isinstance(param, nn.Parameter)
            alone[param] = 0
            if site is None:
                continue
            state = template(param, site, group, plan, layout)
            bases += memory.tensor_bytes({key: state[key] for key in plan.projector.keys})
            site.gap = 1  # refreshed in every step
            kind = (tuple(param.shape), site.rank, param.dtype)
            job = Job(param, param, {}, site, position, layout, param)
            kinds.setdefault(kind, []).append(job)
        everyone = sorted(chain(*kinds.values()), key=lambda job: job.position)
        room = launches.at_once(everyone)
        for jobs in kinds.values():
            site = site_of(jobs[0])
            together = min(len(jobs), at_a_time(site, jobs[0].layout.matrices, plan))
            some = [with_state(job, group, plan) for job in jobs[: min(together, MEASURED)]]
            single = refresh_workspace(some[:1], group, plan)
            several = refresh_workspace(some, group, plan) if len(some) > 1 else single
            if len(some) < together:
                more = max(0, several - single) // (len(some) - 1)
                several += (together - len(some)) * more
            own = max(single, step_workspace(some[:1], 1, launches.at_once(some[:1]), group, plan))
            alone.update((job.leaf, own) for job in jobs)  # type: ignore[misc]
            beside = step_workspace(some, len(jobs), room, group, plan)
            workspace = max(workspace, several, beside)
            moved.append((some[0], plan))
        if plan.feed.slots:
            workspace = max(workspace, fed_workspace(everyone, group, plan))
    made = memory.shared_bytes(optimizer)
    optimizer._session.shared.sweep()  # what a step of all has not asked for is dropped at its end
    for job, plan in moved:
        factor_of(job, plan)
    optimizer._session.shared.sweep()
    shared = memory.shared_bytes(optimizer)
    return Needs(
        moments=memory.predicted_bytes(optimizer) - bases,
        bases=bases,
        shared=shared,
        workspace=workspace + made - shared,
        alone=alone,
    )


def refresh_workspace(jobs: list[Job], group: Group, plan: Plan) -> int:
    """Return what moving the subspaces of some parameters makes and drops, in bytes.

    This covers the first step, a later one, where moments are carried over, and making a basis that
    is not stored. What stays is not counted.
    """
    most = 0
    for step in (0, 1):
        for job in jobs:
            site_of(job).step = step
        most = max(most, dropped_by(lambda: move_subspaces(jobs, group, plan)))
        most = max(most, dropped_by(lambda: factor_of(jobs[0], plan)))
    return most


def factor_of(job: Job, plan: Plan) -> Factor:
    """Return what a gradient is projected with."""
    return plan.projector.factor(job.state, site_of(job))


def step_workspace(jobs: list[Job], count: int, room: int, group: Group, plan: Plan) -> int:
    """Return what a step of `count` parameters like these makes besides a refresh, in bytes.

    Launches of kernels make no more than `room`, and at least what one matrix takes. Without a
    kernel for the plan, plain torch does the step, for one parameter at a time, or for as many as
    a rule for whole matrices takes at once.
    """
    if backend.missing(plan, True) is None:
        return launch_workspace(jobs[0], count, room, group, plan)
    layout, site = jobs[0].layout, site_of(jobs[0])
    held = 1
    if plan.rule.whole:
        held = min(
            count, update.MATRICES_AT_ONCE // max(1, layout.matrices * layout.rows * site.rank)
        )
    one, several = (
        dropped_by(partial(update.step_projected, some, group, plan)) for some in (jobs[:1], jobs)
    )
    more = max(0, several - one) // max(1, len(jobs) - 1)
    return one + (max(1, held) - 1) * more


def fed_workspace(jobs: list[Job], group: Group, plan: Plan) -> int:
    """Return what a later step makes, in bytes, of the first parameters that are fed at once."""
    first = next(feed.fed_chunks(jobs, plan), [])
    some = [with_state(job, group, plan) for job in first]
    for job in some:
        site_of(job).step = 1
    return dropped_by(partial(update.step_projected, some, group, plan))


def launch_workspace(job: Job, count: int, room: int, group: Group, plan: Plan) -> int:
    """Return what the launches of kernels for `count` parameters like this one make, in bytes."""
    _, view = oriented(job.param, job.layout.wide)
    operands = list(launches.operands_of(job, view, None, group, plan))
    each = launches.held_bytes(operands[0], plan)
    return each * min(count * len(operands), max(1, room // max(1, each)))


def with_state(job: Job, group: Group, plan: Plan) -> Job:
    """Return a job with a gradient and a state, all on "meta" except its counts."""
    state = init_state(job.param, job.site, group, plan)
    counts = {key: torch.zeros(()) for key in ("step", "age") if key in state}
    return job._replace(state={**state, **counts}, grad=torch.empty_like(job.param))


def dropped_by(run: Callable[[], Any]) -> int:
    """Return the most bytes that lived in a call beyond those that it left."""
    counted = Live()
    with torch.no_grad(), counted:
        run()
    return counted.peak - counted.now
