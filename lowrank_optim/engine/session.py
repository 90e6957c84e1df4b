"""What is derived from an optimizer and never saved: its groups as they are, and what is open."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..parts.checks import SettingError
from ..parts.plan import Plan
from ..parts.rank import AutoRank, rank_of
from ..parts.types import Group, Shared, State
from ..settings.numbers import placed
from ..settings.plans import check_values, numbers_in, plan_of
from ..settings.values import CHECKS, DERIVED, RATES
from ..sharding.layout import Each
from .members import Members, name_of
from .refresh import Watch
from .sites import Entry, plain_layout, sites_of
from .state import wants

Groups = list[dict[str, Any]]
Seen = tuple[Any, ...]


STRUCTURE = [key for key in CHECKS if key not in RATES]
rates_in, structure_of = itemgetter(*RATES), itemgetter(*STRUCTURE)


PLAIN = frozenset({bool, int, float, type(None)})
"""Types of numbers that are compared by value; every other one is compared by identity."""


class Signature(NamedTuple):
    """What tells whether a setting has been replaced since it was checked.

    Attributes:
        rates: numbers that nothing is derived from.
        structure: all other settings.
        types: the types of these: a rank of 1 is one column, of 1.0 all.
        keys: the keys of the group.
        numbers: the numbers of its parts.
        kinds: the types of rates and numbers: True equals 1.0 and is refused.
    """

    rates: Any
    structure: Any
    types: list[type]
    keys: list[str]
    numbers: dict[str, Any]
    kinds: list[type]

    def settings(self) -> tuple[Any, ...]:
        """Return all but numbers."""
        return self.structure, self.types, self.keys

    def derives(self, other: Signature) -> bool:
        """Return whether what is derived from one holds for the other."""
        if not equal(self.settings(), other.settings()):
            return False
        if self.numbers == other.numbers:
            return True
        pairs = zip(self.numbers.values(), other.numbers.values(), strict=True)
        sites = any(self.numbers.get(key) != other.numbers.get(key) for key in DERIVED)
        return not sites and all((one is None) == (two is None) for one, two in pairs)


def equal(one: Any, two: Any) -> bool:
    """Return whether two values are equal; values that cannot be compared count as different."""
    try:
        return bool(one == two)
    except (RuntimeError, ValueError):
        return False


def signature(group: Group, read: Collection[str]) -> Signature | None:
    """Return the signature of a group; None where a setting has been taken out.

    Args:
        group: the settings.
        read: numbers that its parts read.
    """
    try:
        rates, structure = rates_in(group), structure_of(group)
        types, kinds, numbers = list(map(type, structure)), list(map(type, rates)), {}
        for key in read:
            value = group[key]
            kinds.append(kind := type(value))
            numbers[key] = value if kind in PLAIN else id(value)
        return Signature(rates, structure, types, list(group), numbers, kinds)
    except KeyError:
        return None


def signed(group: Group) -> Signature:
    """Return the signature of a group that has been checked."""
    found = signature(group, numbers_in(group))
    assert found is not None
    return found


def had(known: Mapping[int, Signature], index: int) -> list[dict[str, Any]]:
    """Return what a group had when it was last checked; what all groups had, for a new one."""
    some = [known[index]] if index in known else known.values()
    return [{**dict(zip(STRUCTURE, one.structure, strict=True)), **one.numbers} for one in some]


class Prepared:
    """Checked groups, their plans, and an entry for each parameter.

    Attributes:
        groups: each with its plan and entries.
        each: what the entries of their states are kept for.
    """

    def __init__(
        self,
        groups: Groups,
        members: Members,
        shared: Shared,
        copies: Any,
        states: Mapping[Any, State],
        known: dict[int, Signature],
        defaults: Group,
    ) -> None:
        """Check what has changed and derive the rest.

        Args:
            groups: of the optimizer.
            members: its parameters.
            shared: tensors common to several of them.
            copies: the process group on whose members ordinary tensors are the same, or None.
            states: by parameter.
            known: signatures of the groups as they were last checked, by place; kept up to date.
            defaults: settings of the constructor.
        """
        self.groups: list[tuple[dict[str, Any], Plan, list[Entry]]] = []
        self.each: list[Each] = []
        self._known, self._defaults = known, defaults
        self._seen: list[list[Seen]] = []
        self._lasts = True
        position = 0
        for index, group in enumerate(groups):
            self._check(index, group)
            plan, entries = plan_of(group), []
            wanted = wants(group, plan)
            self._lasts &= not isinstance(rank_of(group["rank"]), AutoRank)
            for place, (param, site) in enumerate(sites_of(group, plan, shared, copies, states)):
                position += 1
                layout = plain_layout(param, group, plan) if site is None else site.layout
                member = members[param]
                member.look(param, wanted)
                entries.append(Entry(param, site, layout, index, place, position, member))
            self.groups.append((group, plan, entries))
            self.each.append(plan.each(group))
            self._seen.append(list(map(seen, group["params"])))
        stagger(self.groups)

    def _check(self, index: int, group: dict[str, Any]) -> None:
        """Check a group whose settings have changed."""
        known, where = self._known.get(index), f" in group {index}"
        now = None if known is None else signature(group, known.numbers)
        if equal(known, now) and now is not None:
            return
        if known is not None and now and equal(known.settings(), now.settings()):
            check_values(group, where, least_lr=-math.inf)
        else:
            found = placed(group, where, self._defaults, had(self._known, index))
            check_values(found, where, least_lr=-math.inf)
            group.clear()
            group.update(found)
        self._known[index] = signed(group)

    @cached_property
    def entries(self) -> dict[Tensor, Entry]:
        """Every parameter's entry."""
        return {entry.param: entry for _, _, entries in self.groups for entry in entries}

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

    def keeps_up(self, groups: Groups) -> bool:
        """Return whether all still holds; check numbers that have changed.

        Ranks that are chosen follow from states, and so never do.
        """
        if not self._lasts or len(groups) != len(self.groups):
            return False
        for index, group in enumerate(groups):
            if not self.group_keeps_up(index, groups):
                return False
            try:
                if list(map(seen, group["params"])) != self._seen[index]:
                    return False
            except AttributeError:  # no tensor
                return False
        return True

    def group_keeps_up(self, index: int, groups: Groups) -> bool:
        """Return whether what is derived from a group still holds; check numbers that changed.

        That a parameter was put in the place of another does not show.
        """
        group, _, entries = self.groups[index]
        if len(groups) != len(self.groups) or groups[index] is not group:
            return False
        before = self._known[index]
        now = signature(group, before.numbers)
        params = group.get("params")
        if not isinstance(params, list) or len(params) != len(entries):
            return False
        if equal(now, before):
            return True
        if now is None or not before.derives(now):
            return False
        self._check(index, group)
        return True


def seen(param: Tensor) -> Seen:
    """Return the properties of a parameter that decide how it is stepped."""
    return id(param), param.requires_grad, param.dtype, param.device, param.shape


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


class OpenStep(Protocol):
    """A step under way, see `step.Step`."""

    done: set[Tensor]

    def close(self) -> None:
        """End the step."""


class InBackward(Protocol):
    """What steps parameters inside the backward pass, see `layerwise.hooks`."""

    projects: bool

    def discard(self) -> None:
        """Forget gradients that were accumulated and not used."""


class Session:
    """What steps, checkpoints, reports and hooks of one optimizer share; a copy starts a new one.

    The optimizer is held weakly, so that its state is freed with it.

    Attributes:
        process_group: the processes on which ordinary tensors are the same, None for one.
        shared: tensors common to several parameters.
        members: the parameters, by themselves.
        watch: which matrices may still wait for their subspace.
        open: the step under way, where parameters are stepped one by one.
        in_backward: what steps them in the backward pass, if anything.
        grad_norm: of all gradients of the last step in the backward pass.
    """

    def __init__(self, optimizer: Optimizer, process_group: Any = None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.process_group = process_group
        self.shared = Shared()
        self.members = Members()
        self.watch = Watch()
        self.open: OpenStep | None = None
        self.in_backward: InBackward | None = None
        self.grad_norm: Tensor | None = None
        self._prepared: Prepared | None = None
        self._known: dict[int, Signature] = {}

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Its groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """Its state, by parameter."""
        return self.optimizer.state

    @property
    def name(self) -> str:
        """What its class is called."""
        return type(self.optimizer).__name__

    def note_members(self) -> None:
        """Take note of what has been changed in the groups from outside."""
        optimizer: Any = self.optimizer
        self.members.note(self.groups, optimizer.defaults, optimizer.scale_of)

    def prepared(self) -> Prepared:
        """Return the groups as they are now, checked, with what follows from their settings."""
        groups = self.groups
        if self._prepared is None or not self._prepared.keeps_up(groups):
            self.note_members()
            self.members.check(groups)
            self._prepared = None  # what was checked stays known, also where a group is refused
            self._prepared = Prepared(
                groups, self.members, self.shared, self.process_group, self.state,
                self._known, self.optimizer.defaults,
            )  # fmt: skip
        return self._prepared

    def prepared_for(self, param: Tensor) -> Prepared:
        """Return the same, where no more is looked at than the group of one parameter."""
        known = self._prepared
        entry = None if known is None else known.entries.get(param)
        if known is None or entry is None or not known.group_keeps_up(entry.group, self.groups):
            return self.prepared()
        return known

    def note_checked(self, index: int) -> None:
        """Note that a group has been checked as it is."""
        self._known[index] = signed(self.groups[index])

    def placed(self, groups: Groups) -> Groups:
        """Return copies of the groups, or of what is saved of them, with numbers in place."""
        defaults, known = self.optimizer.defaults, self._known
        return [
            placed(group, f" in group {index}", defaults, had(known, index))
            for index, group in enumerate(groups)
        ]

    def loaded(self) -> None:
        """Forget what was derived from states, which have been replaced."""
        self._prepared = None
        self.members.forget_fits()
        self.end_step()
        self.recall_norm()

    def note_norm(self) -> None:
        """Write the norm of the last step where it is saved."""
        for group in self.groups:
            group["grad_norm"] = None if self.grad_norm is None else float(self.grad_norm)

    def recall_norm(self) -> None:
        """Take the norm of the last step from where `note_norm` has put it."""
        norm = self.groups[0]["grad_norm"] if self.groups else None
        self.grad_norm = None
        if norm is not None:
            self.grad_norm = torch.tensor(norm, dtype=torch.float64, device="cpu")

    def end_step(self) -> None:
        """End a step under way, and forget gradients that were accumulated for it."""
        if self.open is not None:
            self.open.close()
        if self.in_backward is not None:
            self.in_backward.discard()


def session_of(optimizer: Optimizer, what: str = "this is for") -> Session:
    """Return the session of one of our optimizers.

    Raises:
        TypeError: the optimizer is not one of ours; `what` says what needs one.
    """
    session = getattr(optimizer, "_session", None)
    if not isinstance(session, Session):
        raise TypeError(f"{what} a LowRank, not a {type(optimizer).__name__}")
    return session
