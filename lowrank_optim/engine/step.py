"""One step of an optimizer: what is checked first, what is done, what is left for the next."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import settings
from ..parts.checks import SettingError
from ..parts.plan import Plan
from ..parts.types import Job
from ..settings import plan_of
from ..sharding.collectives import any_of
from ..sharding.local import here, is_distributed
from .backend import refusal
from .members import flat_error, flat_piece
from .refresh import Waiting, Watch, set_steps
from .sites import Entry, name_of, plain_layout, sites_of
from .state import fitting, init_state, misfit, wants
from .update import step_plain, step_projected

if TYPE_CHECKING:
    from ..optimizer import LowRank


class Round:
    """A step under way. Its parameters are done together, or one by one as their gradients come.

    Opening one checks all settings.

    Args:
        optimizer: whose step it is.
        before: the same step as it was opened before settings or groups were changed.
    """

    def __init__(self, optimizer: LowRank, before: Round | None = None) -> None:
        self.optimizer = optimizer
        self.fresh: bool = not optimizer.state if before is None else before.fresh
        self.groups: list[tuple[dict[str, Any], Plan, list[Entry]]] = []
        self.done: set[Tensor] = set() if before is None else before.done
        self.waiting: list[Waiting] = [] if before is None else before.waiting
        optimizer._members.note(optimizer.param_groups, optimizer.defaults)
        optimizer._members.check(optimizer.param_groups)
        self.signatures: list[settings.Signature] = []
        self.wants: list[tuple[Any, ...]] = []
        position, checked = 0, optimizer._signatures
        for index, group in enumerate(optimizer.param_groups):
            if checked.get(index) != settings.signature(group):
                where = f" in group {index}"
                settings.translate(group, where)
                settings.check_keys(group, where)
                settings.check_values(group, where, least_lr=-math.inf)
                checked[index] = settings.signature(group)
            self.signatures.append(checked[index])
            plan, entries = plan_of(group), []
            sites = sites_of(
                group, plan, optimizer._shared, optimizer._process_group, optimizer.state
            )
            for place, (param, site) in enumerate(sites):
                position += 1
                layout = plain_layout(param, group, plan) if site is None else site.layout
                entries.append(Entry(param, site, layout, index, place, position))
            self.groups.append((group, plan, entries))
            self.wants.append(wants(group, plan))
        stagger(self.groups)

    @cached_property
    def entries(self) -> dict[Tensor, Entry]:
        """Every parameter's entry."""
        return {entry.param: entry for _, _, entries in self.groups for entry in entries}

    def keeps_up(self, index: int) -> bool:
        """Return whether what is derived from a group still holds; check rates that have changed.

        That a parameter was put in the place of another does not show.
        """
        groups, (group, _, entries) = self.optimizer.param_groups, self.groups[index]
        if len(groups) != len(self.groups) or groups[index] is not group:
            return False
        now, before = settings.signature(group), self.signatures[index]
        if len(group["params"]) != len(entries) or now.structure != before.structure:
            return False
        if now.rates != before.rates:
            settings.check_values(group, f" in group {index}", least_lr=-math.inf)
            self.signatures[index] = settings.signature(group)
        return True

    def entry_of(self, param: Tensor) -> Entry:
        """Return the entry of a parameter; raise SettingError if the optimizer has none."""
        entry = self.entries.get(param)
        if entry is None:
            raise SettingError(
                f"a parameter of shape {tuple(param.shape)} is in no group of this optimizer: add "
                "it with add_param_group"
            )
        return entry

    def name(self, entry: Entry) -> str:
        """Return what to call a parameter in a message."""
        return name_of(self.groups[entry.group][0], entry.group, entry.place)

    def check_all(self) -> None:
        """Check every parameter that has a gradient."""
        for _, _, entries in self.groups:
            for entry in entries:
                if entry.param.grad is not None:
                    self.check(entry)

    def check(self, entry: Entry) -> None:
        """Raise RuntimeError for a gradient or a parameter that cannot be stepped."""
        param, site, _, index, _, _ = entry
        group, plan, _ = self.groups[index]
        grad = param.grad
        assert grad is not None
        if is_distributed(param) and not is_distributed(grad):
            raise RuntimeError(f"{self.name(entry)} is a DTensor, but its gradient is none")
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name(entry)} has a sparse gradient, which cannot be projected: use "
                "dense gradients (nn.Embedding(sparse=False))"
            )
        if grad.is_complex():
            raise RuntimeError(f"{self.name(entry)} has a complex gradient")
        member = self.optimizer._members[param]
        piece = flat_piece(param, member.shape)
        if piece is not None:
            raise flat_error(self.name(entry), piece)
        state = self.optimizer.state.get(param)
        if site is not None:
            site.kernels = refusal(plan, group, here(param), here(grad), state or {}, True) is None
        if not state:
            return
        wanted = fitting(param, state, self.wants[index])
        if member.fits != wanted:
            if (what := misfit(param, site, state, group, plan)) is not None:
                raise RuntimeError(
                    f"{what} the state of {self.name(entry)}: its group's parts, rank, side and "
                    "state_dtype, and its own shape, dtype and device cannot change once there is "
                    "state. Change it back, or start it without: del optimizer.state[param]"
                )
            member.fits = wanted

    def check_alone(self, entry: Entry, instead: str) -> None:
        """Raise RuntimeError if a parameter cannot be stepped before all gradients are seen."""
        if self.groups[entry.group][0]["skip_nonfinite"]:
            raise RuntimeError(
                f"{self.name(entry)} cannot be stepped alone with skip_nonfinite=True, which has "
                f"to see all gradients before the first is used: {instead}, or take ordinary steps"
            )

    def is_skipped(self) -> bool:
        """Return whether a watched gradient is not finite, and count it."""
        watched = [entries for group, _, entries in self.groups if group["skip_nonfinite"]]
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
        for group, _, _ in self.groups:
            group["skipped_steps"] += group["skip_nonfinite"]

    def warn_if_plain(self) -> None:
        """Warn if nothing that has state is projected: the memory asked for is not saved."""
        entries = [entry for _, _, entries in self.groups for entry in entries]
        used = [entry for entry in entries if self.optimizer.state.get(entry.param)]
        if used and all(entry.site is None for entry in used):
            warnings.warn(
                f"{type(self.optimizer).__name__} projects none of its {len(used)} parameter "
                "tensors and saves nothing: every projected axis is as short as the rank or, where "
                "the rank is a share, every matrix has an axis below min_dim, or the groups with a "
                "rank hold no matrices (lowrank_optim.param_groups finds them)",
                stacklevel=7,
            )

    def jobs(self) -> Work:
        """Create what state is missing, where a gradient is required, and return what is to do."""
        self.optimizer._watch.read()
        work = []
        for group, plan, entries in self.groups:
            jobs = [self.job(entry, entry.param.grad) for entry in entries]
            here = [job for job in jobs if job is not None]
            set_steps(here)
            work.append((group, plan, here))
        return work

    def job(self, entry: Entry, grad: Tensor | None) -> Job | None:
        """Create the state of a parameter if it lacks one, and return what there is to do, if any.

        Its site does not know yet how many updates there were, see `set_steps`.
        """
        param, site, layout, index, _, position = entry
        group, plan, _ = self.groups[index]
        states = self.optimizer.state
        state = states.get(param)
        local = None
        if not state and (param.requires_grad or grad is not None):
            local = layout.local(param)
            fresh = init_state(local, site, group, plan, param.numel())
            state = states[param] = {}
            layout.view(state, plan.each(group)).update(fresh)
            self.optimizer._members[param].fits = fitting(param, state, self.wants[index])
        if grad is None or state is None:
            return None
        return Job(
            layout.local(param) if local is None else local,
            layout.gradient(grad),
            layout.view(state, plan.each(group)),
            site,
            position,
            layout,
            param,
        )

    def single(self, entry: Entry, grad: Tensor) -> Job:
        """Return the job of one parameter with this gradient; its site knows its step."""
        self.optimizer._watch.read()
        job = self.job(entry, grad)
        assert job is not None
        set_steps([job])
        return job

    def do(self, work: Work) -> None:
        """Do the steps of some parameters."""
        with without_autocast(work):
            for group, plan, jobs in work:
                if projected := [job for job in jobs if job.site is not None]:
                    self.waiting += step_projected(projected, group, plan)
                if plain := [job for job in jobs if job.site is None]:
                    step_plain(plain, group, plan)
                for job in jobs:
                    job.layout.write_back(job.leaf, job.param)
                    self.done.add(job.leaf)

    def close(self) -> None:
        """End the step."""
        self.optimizer._watch.read()
        self.optimizer._watch = Watch(self.waiting)
        self.optimizer._shared.sweep()
        self.optimizer._round = None


def open_step(optimizer: LowRank) -> Round:
    """Return the step under way, or a new one, with groups and settings as they are now."""
    turn = optimizer._round
    current = (
        turn is not None
        and all(map(turn.keeps_up, range(len(turn.groups))))
        and all(
            entry.param is param
            for group, _, entries in turn.groups
            for entry, param in zip(entries, group["params"], strict=True)
        )
    )
    return turn if turn is not None and current else Round(optimizer, turn)


def open_for(optimizer: LowRank, param: Tensor) -> tuple[Round, Entry | None]:
    """Return the step under way and the entry of a parameter, with settings as they are now.

    The entry is None for a parameter in no group.
    """
    turn = optimizer._round
    entry = None if turn is None else turn.entries.get(param)
    if turn is None or entry is None or not turn.keeps_up(entry.group):
        turn = Round(optimizer, turn)
        entry = turn.entries.get(param)
    return turn, entry


def stagger(groups: list[tuple[dict[str, Any], Plan, list[Entry]]]) -> None:
    """Spread the refreshes of all matrices whose subspaces are learnt over their intervals."""
    sites = [
        entry.site
        for group, plan, entries in groups
        for entry in entries
        if plan.projector.learns and group["stagger"] and not group["capturable"]
        if entry.site is not None and entry.param.requires_grad
    ]
    for place, site in enumerate(sites):
        site.phase = place * site.gap // len(sites)


Work = list[tuple[dict[str, Any], Plan, list[Job]]]


@contextmanager
def without_autocast(work: Work) -> Iterator[None]:
    """Compute in the dtypes that are written, as torch's optimizers do, also under autocast."""
    devices = {job.param.device.type for _, _, jobs in work for job in jobs}
    with ExitStack() as stack:
        for device in devices:
            if device != "meta" and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def is_rehearsal(work: Work) -> bool:
    """Return whether there are gradients, all zero, and every lr is 0. Looks at lr first."""
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
