"""What DistributedDataParallel calls with its buckets: hooks for `register_comm_hook`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..engine.refresh import is_due, is_tried_again, set_steps
from ..engine.session import session_of
from ..engine.step import Step, open_step
from ..functional import down, lift_
from ..functional.factors import oriented
from ..parts.checks import SettingError
from ..parts.plan import Plan
from ..parts.types import Group, Job

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


Hook = TypeVar("Hook", bound=Callable[..., Any])

Stepper = weakref.WeakMethod[Callable[[list[Tensor], list[Tensor]], None]]
"""What steps the parameters of a bucket, given them and their averaged gradients."""

STEPPERS: MutableMapping[Any, Stepper] = weakref.WeakKeyDictionary()
"""What steps a model's buckets, set by the last `step_in_backward` for it."""


def hook(function: Hook) -> Hook:
    """Mark a function as a hook: DDP wants its own classes as annotations, not their names."""
    function.__annotations__ = {}
    return function


class Piece(NamedTuple):
    """One parameter of a bucket: its gradient there, and what is sent of it.

    `job` is given where the projected gradient is sent.
    """

    grad: Tensor
    sent: Tensor
    job: Job | None
    plan: Plan | None


def done(buffer: Tensor) -> torch.futures.Future[Tensor]:
    """Return a future of a bucket that is ready."""
    devices: list[Any] | None = [buffer.device] if buffer.device.type == "cuda" else None
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(buffer)
    return future


def average_(x: Tensor, group: Any) -> Tensor:
    """Average a tensor over the processes of a group, in place, dividing first as DDP does."""
    dist.all_reduce(x.div_(dist.get_world_size(group)), group=group)
    return x


def step_by_buckets(model: DistributedDataParallel, stepper: Stepper) -> None:
    """Let a model's buckets be stepped once they are averaged.

    Raises:
        ValueError: the model looks for unused parameters: it is known too late which these are.
        RuntimeError: the model has another communication hook.
    """
    if model.find_unused_parameters:
        raise SettingError(
            "step_in_backward does not go with find_unused_parameters=True: which parameters are "
            "unused is known after they would have been stepped"
        )
    if model not in STEPPERS:
        model.register_comm_hook(weakref.ref(model), average_and_step)
    STEPPERS[model] = stepper


@hook
def average_and_step(
    model: weakref.ref[DistributedDataParallel], bucket: Any
) -> torch.futures.Future[Tensor]:
    """Average a bucket, then step its parameters if `step_in_backward` is on."""
    alive = model()
    buffer = average_(bucket.buffer(), None if alive is None else alive.process_group)
    stepper = None if alive is None else STEPPERS.get(alive)
    step = None if stepper is None else stepper()
    if step is not None:
        step(bucket.parameters(), bucket.gradients())
    return done(buffer)


@torch.no_grad()
@hook
def projected_all_reduce(optimizer: Optimizer, bucket: Any) -> torch.futures.Future[Tensor]:
    """Average projected gradients instead of whole ones: `rows * rank` values a matrix.

    For `model.register_comm_hook(optimizer, projected_all_reduce)` of DistributedDataParallel, and
    updates that need no more than R = G P (GaLore, DCT, FRUGAL with state_free="none"). A gradient
    becomes the mean of R P^T: the step then projects it to the mean of R again, to rounding, and
    clipping sees the norm of what is used. In a step that moves a matrix's subspace its gradient is
    averaged whole, as are gradients of parameters that are not projected.

    Args:
        optimizer: the model's optimizer; its `process_group`, if it has one, is averaged over.
        bucket: what DDP gives.

    Returns:
        A future of the averaged bucket.

    Raises:
        ValueError: an update that needs the whole gradient, or a subspace that moves every step.

    Reference: the idea is from Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank
        Gradient Compression for Distributed Optimization", arXiv 1905.13727; here the subspace is
        the optimizer's, and nothing is lost that it would use.
    """
    session = session_of(optimizer, "projected_all_reduce is for")
    step = open_step(session)
    session.open = step
    session.watch.read()
    check_compressible(step)
    pieces = [
        piece_of(step, param, grad)
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True)
    ]
    flat = torch.cat([piece.sent.reshape(-1) for piece in pieces])
    average_(flat, session.process_group)
    means = flat.split([piece.sent.numel() for piece in pieces])  # type: ignore[no-untyped-call]
    for piece, mean in zip(pieces, means, strict=True):
        write(piece, mean.view(piece.sent.shape))
    return done(bucket.buffer())


def check_compressible(step: Step) -> None:
    """Raise SettingError if a group's updates need more than projected gradients."""
    for index, (group, plan, _) in enumerate(step.prepared.groups):
        if group["rank"] is None:
            continue
        what = f"projected_all_reduce does not go with group {index}"
        if plan.feed.slots or plan.want.low or plan.residual.want.norms:
            part = plan.feed if plan.feed.slots else plan.residual
            raise SettingError(
                f"{what}: the update of {type(part).__name__} needs the whole gradient; leave the "
                "hook out"
            )
        if plan.length.sampled:
            raise SettingError(
                f"{what}: length={group['length']!r} is measured on entries of the whole gradient; "
                'leave the hook out, or take length="rms" or "published"'
            )
        if plan.projector.learns and group["update_proj_gap"] == 1:
            raise SettingError(
                f"{what}: update_proj_gap=1 moves the subspace in every step, which takes the "
                "whole gradient; take a larger one"
            )


def piece_of(step: Step, param: Tensor, grad: Tensor) -> Piece:
    """Return what is sent of a gradient: all of it, or its projection."""
    entry = step.prepared.entries.get(param)
    state = step.session.state.get(param)
    if entry is None or entry.site is None or not state:
        return Piece(grad, grad, None, None)
    group, plan, _ = step.prepared.groups[entry.group]
    job = step.job(entry, grad)
    assert job is not None
    set_steps([job])
    if moves(job, group, plan):
        return Piece(grad, grad, None, None)
    _, view = oriented(grad, entry.layout.wide)
    factor = plan.projector.factor(job.state, entry.site)
    return Piece(grad, down(view, factor, entry.site.dtype).to(grad.dtype), job, plan)


def moves(job: Job, group: Group, plan: Plan) -> bool:
    """Return whether the subspace of a matrix moves in the step to come."""
    assert job.site is not None
    return is_due(job.site, job.state, group, plan) or is_tried_again(job)


def write(piece: Piece, mean: Tensor) -> None:
    """Write the averaged gradient of a parameter into its bucket."""
    if piece.job is None or piece.plan is None:
        piece.grad.copy_(mean)
        return
    assert piece.job.site is not None
    matrix, view = oriented(piece.grad, piece.job.layout.wide)
    factor = piece.plan.projector.factor(piece.job.state, piece.job.site)
    view.zero_()
    if isinstance(factor, Tensor) and factor.is_floating_point():
        factor = factor.to(view.dtype)
    lift_(view, mean, factor)
    if matrix.data_ptr() != piece.grad.data_ptr():
        piece.grad.copy_(matrix.view(piece.grad.shape))
