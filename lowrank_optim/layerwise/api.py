"""Layer-wise updates as an optimizer offers them: start, step one parameter, measure a norm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.session import Session
from ..engine.step import open_for
from .hooks import InBackward, of

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


def step_one(session: Session, param: Tensor) -> None:
    """Do what `LowRank.step_param` says."""
    if session.open is not None and param in session.open.done:
        session.end_step()
    step, _ = open_for(session, param)
    entry = step.prepared.entry_of(param)
    if param.grad is None:
        return
    step.check(entry)
    step.check_alone(entry, "clip or check gradients in the hook")
    session.open = step
    job = step.single(entry, param.grad)
    group, plan, _ = step.prepared.groups[entry.group]
    step.do([(group, plan, [job])])


def start(
    session: Session,
    accumulation_steps: int | Callable[[], bool],
    accumulate: str,
    max_norm: float | None,
    model: DistributedDataParallel | None,
) -> InBackward:
    """Do what `LowRank.step_in_backward` says."""
    handle = InBackward(session, accumulation_steps, accumulate, max_norm, model)
    before = of(session)
    if before is not None:
        before.remove()
    session.end_step()
    session.in_backward = handle
    return handle


def measuring(session: Session) -> AbstractContextManager[None]:
    """Do what `LowRank.measure_grad_norm` says."""
    handle = of(session)
    if handle is None:
        raise RuntimeError(
            "measure_grad_norm is for step_in_backward: without it, all gradients are there "
            "after the backward pass, for torch.nn.utils.clip_grad_norm_"
        )
    return handle.measuring()
