"""Updates inside the backward pass: each parameter is stepped when its gradient is complete."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..engine.session import Session
from ..engine.sites import Entry
from ..engine.step import Step, open_for, without_autocast
from ..engine.update import project
from ..parts.checks import SettingError, fail, is_real
from ..parts.types import Group, Job
from ..settings.plans import plan_of
from ..sharding.collectives import several
from ..sharding.local import is_distributed, reuse_later
from .clipping import asked_by_trainer, clipper_called
from .ddp import step_by_buckets
from .norms import Norm, norm_of, total_norm
from .passes import Passes

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


ACCUMULATE = ("full", "projected")
STEPPED: MutableMapping[Tensor, RemovableHandle] = WeakTensorKeyDictionary()
"""The hook that steps a parameter, set by the optimizer that asked for it last."""
TINY = 1e-6
"""Added to a norm that is divided by, as in `torch.nn.utils.clip_grad_norm_`."""


class InBackward:
    """Step parameters from hooks that autograd calls, and free their gradients.

    `LowRank.step_in_backward` returns this; `remove()` goes back to ordinary steps. It is not part
    of any state; the optimizer is held weakly, so that hooks left on a model do nothing without it.
    """

    def __init__(
        self,
        session: Session,
        accumulation_steps: int | Callable[[], bool],
        accumulate: str,
        max_norm: float | None,
        model: DistributedDataParallel | None = None,
    ) -> None:
        check_settings(session, accumulation_steps, accumulate, max_norm)
        if model is not None and (accumulation_steps != 1 or accumulate != "full"):
            raise SettingError(
                "with ddp=model, gradients are accumulated by DistributedDataParallel: run the "
                "other backward passes inside model.no_sync(), and leave accumulation_steps and "
                "accumulate out"
            )
        self.model = model
        self.accumulation_steps = accumulation_steps
        self.projects = accumulate == "projected"
        self.max_norm = max_norm
        self._session = weakref.ref(session)
        self._handles: MutableMapping[Tensor, RemovableHandle] = WeakTensorKeyDictionary()
        self._lock = threading.RLock()
        self._sums: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
        self._passes: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._versions: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        self._norms: list[Norm] = []
        self._watched: list[Norm] = []
        self._measuring = False
        self._measured: Tensor | None = None
        self._skips = False
        self._asked = False
        self._under_way = Passes()
        if model is not None:
            step_by_buckets(model, weakref.WeakMethod(self.averaged))
        self.attach(session)

    def attach(self, session: Session) -> None:
        """Put a hook on every parameter that requires a gradient and has no hook yet.

        With several processes ordinary tensors get none: a hook would see unaveraged gradients.
        """
        params = [param for group in session.groups for param in group["params"]]
        for param in set(self._handles) - set(params):
            self._handles.pop(param).remove()
        for param in params:
            complete = is_distributed(param) or not (several() or self.model is not None)
            if complete and param.requires_grad and param not in self._handles:
                if (other := STEPPED.get(param)) is not None:
                    other.remove()
                hook = torch.compiler.disable(self._arrived)  # type: ignore[no-untyped-call]
                handle = param.register_post_accumulate_grad_hook(hook)
                STEPPED[param] = self._handles[param] = handle

    def remove(self) -> None:
        """Take the hooks away: from now on `step()` does all.

        What has been accumulated in projected form is forgotten.
        """
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        session = self._session()
        if session is not None and session.in_backward is self:
            session.end_step()
            session.in_backward = None

    @property
    def session(self) -> Session:
        """The session of the optimizer."""
        session = self._session()
        assert session is not None
        return session

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let backward passes only measure the norm of the gradients, and free these."""
        if self.model is not None:
            raise RuntimeError(
                "measure_grad_norm needs two backward passes of one forward pass, which "
                "DistributedDataParallel does not allow: clip by the previous norm"
            )
        if self.accumulation_steps != 1:
            raise RuntimeError(
                "the norm of gradients that are accumulated is known when they are complete, and "
                "then they are in memory: take ordinary steps with "
                "torch.nn.utils.clip_grad_norm_, or clip by the previous norm"
            )
        self._measuring, self._norms, self._watched = True, [], []
        try:
            yield
            self._measured = total_norm(self._norms)
            watched = total_norm(self._watched)
            self._skips = watched is not None and not bool(watched.isfinite())
        finally:
            self._measuring, self._norms, self._watched = False, [], []

    def _arrived(self, param: Tensor) -> None:
        """Use a gradient that is complete for this backward pass."""
        session = self._session()
        if session is None or param.grad is None:
            return
        with self._lock, torch.no_grad():
            if self._under_way.enter():
                session.end_step()  # the step whose backward pass has failed
            step, entry = open_for(session, param)
            if entry is None:  # taken out of its group: from here on it is as any other tensor
                self._handles.pop(param).remove()
                return
            session.open = step
            if self._measuring:
                self._measure(step, entry)
            elif not self._skips and not self._use(step, entry):
                return
            reuse_later(param.grad)
            param.grad = None

    def look_for_clipping(self, closure: Callable[[], Any] | None) -> None:
        """Clip as the trainer that calls `step` is told to, or warn once that nothing is clipped.

        Args:
            closure: what `step` was given.
        """
        if self.max_norm is not None or self._asked:
            return
        self._asked = True
        norm, setting = asked_by_trainer(closure)
        if norm is not None:
            self.max_norm = norm
        elif (what := setting or clipper_called()) is not None:
            warnings.warn(
                f"{what} finds no gradients to clip: step_in_backward has used and freed them. "
                "Pass the norm there, as step_in_backward(max_norm=1.0); max_norm=math.inf says "
                "that nothing is to be clipped",
                stacklevel=7,
            )

    def averaged(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Step the parameters of a bucket, whose gradients have been averaged."""
        session = self._session()
        if session is None or session.in_backward is not self:
            return
        with self._lock, torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                if param in session.members:
                    step, entry = open_for(session, param)
                    assert entry is not None
                    session.open = step
                    param.grad = grad
                    self._use(step, entry)
                    param.grad = None

    def _measure(self, step: Step, entry: Entry) -> None:
        """Note the norm of a gradient, and whether `skip_nonfinite` watches it."""
        self._check(step, entry)
        assert entry.param.grad is not None
        self._norms.append(norm_of(entry.layout.gradient(entry.param.grad), entry.layout))
        if step.prepared.groups[entry.group][0]["skip_nonfinite"]:
            self._watched.append(self._norms[-1])

    def _use(self, step: Step, entry: Entry) -> bool:
        """Step a parameter, or add its gradient to what it waits for; return whether it is used."""
        param = entry.param
        self._check(step, entry)
        self._count_pass(param)
        last = self.accumulation_steps
        if not (last() if callable(last) else self._passes[param] == last):
            return self.projects and entry.site is not None and self._collect(step, entry)
        group, plan, _ = step.prepared.groups[entry.group]
        if param in self._sums:
            self._collect(step, entry)
        job = job_of(step, entry)
        step.do([(group, plan, [self._ready(job)])])
        return True

    def _count_pass(self, param: Tensor) -> None:
        """Count a pass; start at 1 again where the gradients of earlier passes were set to None.

        The version of a gradient grows when it is added to. A gradient that is made anew, as after
        an exception in the forward pass and `model.zero_grad()`, has version 0.
        """
        assert param.grad is not None
        if not self.projects and not is_distributed(param):
            version = param.grad._version
            if version <= self._versions.get(param, -1):
                self._passes.pop(param, None)
            self._versions[param] = version
        self._passes[param] = self._passes.get(param, 0) + 1

    def _check(self, step: Step, entry: Entry) -> None:
        """Raise RuntimeError for a gradient that cannot be used; nothing is changed then."""
        if entry.param in step.done:
            raise RuntimeError(
                f"{step.name(entry)} has been stepped and got one more gradient before "
                "optimizer.step(), which ends a step also with step_in_backward: call it after the "
                "backward pass. To accumulate gradients say so: "
                "step_in_backward(accumulation_steps=...). A parameter that is used in several "
                "checkpoints needs use_reentrant=False"
            )
        step.check(entry)
        assert entry.param.grad is not None
        if entry.param.grad.dtype == torch.float16:
            raise RuntimeError(
                f"{step.name(entry)} has a float16 gradient, which needs a GradScaler, and that "
                "has to see all gradients before the first is used: take bfloat16, or ordinary "
                "steps"
            )
        if self._measured is None and not self._measuring:
            first = "run a backward pass inside `optimizer.measure_grad_norm()` first"
            step.check_alone(entry, first if self.accumulation_steps == 1 else "do not accumulate")

    def _collect(self, step: Step, entry: Entry) -> bool:
        """Add the projected gradient to what was projected in earlier backward passes."""
        group, plan, _ = step.prepared.groups[entry.group]
        job = job_of(step, entry)._replace(low=self._sums.get(entry.param))
        with without_autocast([(group, plan, [job])]):
            self._sums[entry.param], waiting = project(job, group, plan)
        step.waiting += waiting
        return True

    def _ready(self, job: Job) -> Job:
        """Return a job with its projected gradient, if there is one, clipped in place."""
        job = job._replace(low=self._sums.pop(job.leaf, None))
        grad = job.grad if job.low is None else job.low
        norm = norm_of(grad, job.layout)
        self._norms.append(norm)
        if self.max_norm is not None and self.max_norm < math.inf:
            grad.mul_(self._coefficient(norm).to(grad.device))
        return job

    def _coefficient(self, norm: Norm) -> Tensor:
        """Return the factor of a gradient of this norm.

        min(1, max_norm / total): total is the measured norm of all gradients, or else the larger
        of the norm in the step before and the gradient's own.
        """
        assert self.max_norm is not None
        session = self._session()
        total = self._measured
        if total is None:
            before = None if session is None else session.grad_norm
            total = total_norm([norm])
            assert total is not None
            if before is not None:
                total = torch.maximum(before.to(total).nan_to_num(posinf=0.0), total)
        return (self.max_norm / (total + TINY)).clamp(max=1.0)

    def check_attached(self) -> None:
        """Raise RuntimeError if no gradient is complete when the backward pass gives it."""
        self.attach(self.session)
        if several() and not self._handles and self.model is None:
            raise RuntimeError(
                "step_in_backward has nothing to step: with several processes, the gradients of "
                "ordinary tensors are not averaged when the backward pass gives them. Pass "
                "ddp=model for DistributedDataParallel, shard with fully_shard, or take ordinary "
                "steps"
            )

    def finish(self, step: Step) -> None:
        """Step what has not been stepped, and note the norm of all gradients of the step."""
        if self._skips:
            step.count_skipped()
        else:
            self._finish(step)
        norm = total_norm(self._norms) if self._measured is None else self._measured
        if norm is not None:
            self.session.grad_norm = norm
        self.end()

    def end(self) -> None:
        """Forget what was measured and accumulated for a step, and put hooks where there are none.

        Gradients that `step()` itself has used are freed too: nothing may be added to them.
        """
        self._measured, self._skips = None, False
        self.discard()
        for group in self.session.groups:
            for param in group["params"]:
                param.grad = None
        self.attach(self.session)

    def _finish(self, step: Step) -> None:
        work = []
        for group, plan, entries in step.prepared.groups:
            jobs = []
            for entry in (entry for entry in entries if entry.param not in step.done):
                if entry.param.grad is not None and entry.param in self._sums:
                    self._collect(step, entry)
                if entry.param.grad is not None or entry.param in self._sums:
                    jobs.append(self._ready(job_of(step, entry)))
            work.append((group, plan, jobs))
        step.do(work)

    def discard(self) -> None:
        """Forget gradients that were accumulated and not used."""
        self._sums.clear()
        self._passes.clear()
        self._versions.clear()
        self._norms = []


def check_settings(
    session: Session,
    accumulation_steps: int | Callable[[], bool],
    accumulate: str,
    max_norm: float | None,
) -> None:
    """Raise an error for settings that cannot be used; see `LowRank.step_in_backward`."""
    whole = isinstance(accumulation_steps, int) and not isinstance(accumulation_steps, bool)
    if not callable(accumulation_steps) and not (whole and accumulation_steps >= 1):
        raise fail(
            "", "accumulation_steps", accumulation_steps, "an int of at least 1, or a function "
            "that says whether the backward pass under way is the last of its step"
        )  # fmt: skip
    if accumulate not in ACCUMULATE:
        raise fail("", "accumulate", accumulate, "one of 'full', 'projected'")
    if max_norm is not None and not (is_real(max_norm) and max_norm > 0):
        raise fail("", "max_norm", max_norm, "None or a number above 0")
    if accumulate == "projected":
        for index, group in enumerate(session.groups):
            check_accumulable(index, group, session.name)


def check_accumulable(index: int, group: Group, name: str) -> None:
    """Raise SettingError if a group's update needs more than the projected gradient."""
    plan = plan_of(group)
    want = plan.want
    part = plan.feed if plan.feed.slots else plan.residual
    if group["rank"] is not None and (plan.feed.slots or want.low or want.norms):
        raise SettingError(
            f"accumulate='projected' does not go with {type(part).__name__} in group "
            f"{index} of {name}: its update needs the whole gradient, not the "
            "projected one alone; choose accumulate='full', or GaLoreAdamW or DCTAdamW"
        )
    if group["rank"] is not None and plan.length.sampled:
        raise SettingError(
            f"accumulate='projected' does not go with length={group['length']!r} in group {index} "
            f"of {name}: AdamW's length is measured on entries of the whole gradient; choose "
            'accumulate=\'full\', or length="rms" or "published"'
        )


def of(session: Session) -> InBackward | None:
    """Return what steps parameters of an optimizer in the backward pass, if anything."""
    return cast("InBackward | None", session.in_backward)


def job_of(step: Step, entry: Entry) -> Job:
    """Return the job of a parameter; a missing gradient counts as zero."""
    param, grad = entry.param, entry.param.grad
    if grad is None and is_distributed(param):
        grad = torch.zeros_like(param)
    return step.single(entry, param.new_zeros(()).expand_as(param) if grad is None else grad)
