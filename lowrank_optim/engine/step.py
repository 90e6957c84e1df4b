"""One step of an optimizer: check everything, then do the work, then close."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from ..parts.plan import Plan
from ..parts.types import Job, State
from ..sharding.collectives import any_of
from ..sharding.local import here, is_distributed
from .backend import prepare
from .members import flat_error
from .refresh import Waiting, Watch, set_steps
from .session import Prepared, Session
from .sites import Entry
from .state import init_state, misfit
from .update import step_plain, step_projected

Work = list[tuple[dict[str, Any], Plan, list[Job]]]
"""The jobs of each group."""

States = dict[Any, dict[str, Any]]
"""The state of an optimizer, by parameter."""


class Step:
    """A step under way. Its parameters are done together, or one by one as their gradients come.

    Attributes:
        session: of the optimizer.
        fresh: whether there was no state before.
        prepared: the groups as they are now.
        done: parameters that have been stepped.
        waiting: which matrices may lack a subspace.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.fresh = not session.state
        self.prepared: Prepared = session.prepared()
        self.done: set[Tensor] = set()
        self.waiting: list[Waiting] = []

    def check_all(self) -> None:
        """Check every parameter that has a gradient."""
        states = self.session.state
        for _, _, entries in self.prepared.groups:
            for entry in entries:
                if entry.param.grad is not None:
                    self.check(entry, states)

    def check(self, entry: Entry, states: States | None = None) -> None:
        """Raise RuntimeError for a gradient or a parameter that cannot be stepped."""
        param, site, layout, index, _, _, member = entry
        group, plan, _ = self.prepared.groups[index]
        grad = param.grad
        assert grad is not None
        if layout.mesh is not None and not is_distributed(grad):
            raise RuntimeError(f"{self.name(entry)} is a DTensor, and its gradient is not")
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name(entry)} has a sparse gradient, which cannot be projected: use "
                "dense gradients (nn.Embedding(sparse=False))"
            )
        if grad.dtype.is_complex:
            raise RuntimeError(f"{self.name(entry)} has a complex gradient")
        if member.piece is not None:
            raise flat_error(self.name(entry), member.piece)
        state = (self.session.state if states is None else states).get(param)
        kind = (grad.dtype, type(grad))
        if site is not None and site.prepared_for != kind:
            prepare(site, plan, group, here(param), here(grad))
            site.prepared_for = kind
        if not state:
            return
        held = tensors_of(state)
        if member.fits != held:
            if (what := misfit(param, site, state, group, plan)) is not None:
                raise RuntimeError(
                    f"{what} the state of {self.name(entry)}: its group's parts, rank, side, "
                    "length and state_dtype, and its own shape, dtype and device cannot change "
                    "once there is state. Change it back, or start it without: "
                    "del optimizer.state[param]"
                )
            member.fits = held

    def check_alone(self, entry: Entry, instead: str) -> None:
        """Raise RuntimeError if a parameter cannot be stepped before all gradients are seen."""
        if self.prepared.groups[entry.group][0]["skip_nonfinite"]:
            raise RuntimeError(
                f"{self.name(entry)} cannot be stepped alone with skip_nonfinite=True, which has "
                f"to see all gradients before the first is used: {instead}, or take ordinary steps"
            )

    def name(self, entry: Entry) -> str:
        """Return what to call a parameter in a message."""
        return self.prepared.name(entry)

    def is_skipped(self) -> bool:
        """Return whether a watched gradient is not finite, and count it."""
        watched = [entries for group, _, entries in self.prepared.groups if group["skip_nonfinite"]]
        if not watched:
            return False
        seen = [e for entries in watched for e in entries if e.param.grad is not None]
        if not seen:
            return False
        grads = [grad for grad in (here(entry.param.grad) for entry in seen) if grad.numel()]
        extremes = [torch.maximum(grad.amax(), -grad.amin()).isfinite() for grad in grads]
        device = here(seen[0].param).device
        bad = bool(extremes) and not torch.stack([fine.to(device) for fine in extremes]).all()
        if not any_of(bad, [entry.layout.everyone for entry in seen], device):
            return False
        self.count_skipped()
        return True

    def count_skipped(self) -> None:
        """Count a step that is left out because a gradient is not finite."""
        for group, _, _ in self.prepared.groups:
            group["skipped_steps"] += group["skip_nonfinite"]

    def warn_if_plain(self) -> None:
        """Warn if nothing that has state is projected: the memory asked for is not saved."""
        entries = [entry for _, _, entries in self.prepared.groups for entry in entries]
        used = [entry for entry in entries if self.session.state.get(entry.param)]
        if used and all(entry.site is None for entry in used):
            warnings.warn(
                f"{self.session.name} projects none of its {len(used)} parameter "
                "tensors and saves nothing: every projected axis is as short as the rank or, where "
                "the rank is a share, every matrix has an axis below min_dim, or the groups with a "
                "rank hold no matrices (lowrank_optim.param_groups finds them)",
                stacklevel=7,
            )

    def jobs(self) -> Work:
        """Create what state is missing, where a gradient is required, and return what is to do."""
        self.session.watch.read()
        work = []
        states = self.session.state
        for group, plan, entries in self.prepared.groups:
            jobs = [self.job(entry, entry.param.grad, states) for entry in entries]
            here = [job for job in jobs if job is not None]
            set_steps(here)
            work.append((group, plan, here))
        return work

    def job(self, entry: Entry, grad: Tensor | None, states: States | None = None) -> Job | None:
        """Create the state of a parameter if it lacks one, and return what there is to do, if any.

        `set_steps` must tell its site afterwards how many updates there were.
        """
        param, site, layout, index, _, position, member = entry
        states = self.session.state if states is None else states
        state, local = states.get(param), None
        if not state and (param.requires_grad or grad is not None):
            group, plan, _ = self.prepared.groups[index]
            local = layout.local(param)
            fresh = init_state(local, site, group, plan, param.numel())
            state = states[param] = {}
            layout.view(state, self.prepared.each[index]).update(fresh)
            member.fits = tensors_of(state)
        if grad is None or state is None:
            return None
        if layout.mesh is None:
            return Job(param, grad, state, site, position, layout, param)
        return Job(
            layout.local(param) if local is None else local,
            layout.gradient(grad),
            layout.view(state, self.prepared.each[index]),
            site,
            position,
            layout,
            param,
        )

    def single(self, entry: Entry, grad: Tensor) -> Job:
        """Return the job of one parameter with this gradient; its site knows its step."""
        self.session.watch.read()
        job = self.job(entry, grad)
        assert job is not None
        set_steps([job])
        return job

    def do(self, work: Work) -> None:
        """Do the steps of some parameters."""
        with without_autocast(work):
            for group, plan, jobs in work:
                projected = [job for job in jobs if job.site is not None]
                if projected:
                    self.waiting += step_projected(projected, group, plan)
                if len(projected) < len(jobs):
                    step_plain([job for job in jobs if job.site is None], group, plan)
                for job in jobs:
                    if job.layout.moves:
                        job.layout.write_back(job.leaf, job.param)
                    self.done.add(job.leaf)

    def close(self) -> None:
        """End the step."""
        session = self.session
        session.watch.read()
        if self.waiting:
            session.watch = Watch(self.waiting)
        if session.shared.kept:
            session.shared.sweep()
        session.open = None


def open_step(session: Session) -> Step:
    """Return the step under way, or a new one, with groups and settings as they are now."""
    if session.open is None:
        return Step(session)
    step = cast(Step, session.open)
    step.prepared = session.prepared()
    return step


def open_for(session: Session, param: Tensor) -> tuple[Step, Entry | None]:
    """Return the step under way and the entry of a parameter, with settings as they are now.

    The entry is None for a parameter in no group.
    """
    if session.open is None:
        step = Step(session)
    else:
        step = cast(Step, session.open)
        step.prepared = session.prepared_for(param)
    return step, step.prepared.entries.get(param)


def tensors_of(state: State) -> list[int]:
    """Return the identities of the tensors in a state, which tell whether one was replaced."""
    return [id(value) for value in state.values() if isinstance(value, Tensor)]


def without_autocast(work: Work) -> AbstractContextManager[Any]:
    """Return a context without autocast: a step computes in the dtypes that are written."""
    devices = {job.param.device.type for _, _, jobs in work for job in jobs} - {"meta"}
    under_way = [device for device in devices if torch.is_autocast_enabled(device)]
    if not under_way:
        return nullcontext()
    stack = ExitStack()
    for device in under_way:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def is_rehearsal(work: Work) -> bool:
    """Return whether every lr is 0 and there are gradients, which are all zero. Checks lr first."""
    rates = [group["lr"] for group, _, jobs in work if jobs]
    if not rates:
        return False
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return False
    if any(float(rate) != 0 for rate in rates):
        return False
    all_jobs = [job for _, _, jobs in work for job in jobs]
    moves = any(bool(job.grad.count_nonzero()) for job in all_jobs)
    return not any_of(moves, [job.layout.everyone for job in all_jobs], all_jobs[0].grad.device)
