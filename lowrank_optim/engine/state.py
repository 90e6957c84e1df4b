"""The state of a parameter: making it, and checking that it fits its group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.factors import oriented
from ..parts.checks import is_real
from ..parts.length import LENGTHS
from ..parts.numbers import numbers_of, with_numbers
from ..parts.plan import Plan
from ..parts.protocols import Storage
from ..parts.rank import rank_asked
from ..parts.storage import forms
from ..parts.types import COUNTED, Group, Site, State
from ..settings.values import PARTS
from ..sharding.layout import Layout


def init_state(
    param: Tensor, site: Site | None, group: Group, plan: Plan, size: int | None = None
) -> State:
    """Return a new state, on the device of `param`.

    Args:
        param: the parameter, or what a process holds of it.
        site, group, plan: of the parameter.
        size: elements of the whole parameter, if a process holds only a part.
    """
    size = param.numel() if size is None else size
    moments: State = {}
    for slot, storage, shape, whole in moments_to_be(param, site, plan, size):
        moments.update(storage.zeros(slot, shape, param, whole))
    if site is None:
        return {"step": zero_count(step_device(param, moments, group, plan)), **moments}
    state: dict[str, Any] = {"step": zero_count(step_device(param, None, group, plan)), **moments}
    _, view = oriented(param, site.layout.wide)
    batch, rows = tuple(view.shape[:-2]), view.shape[-2]
    if plan.on_refresh == "reset":
        state["age"] = torch.zeros_like(state["step"])
    if plan.projector.learns:
        state["pending"] = 1
        state["unset"] = torch.ones(batch, dtype=torch.bool, device=param.device)
    state.update(plan.projector.init(batch, plan.storage.dtype(param), site))
    for part in (plan.rule, plan.residual, plan.length):
        state.update(part.init(batch, rows, site))
    return state


class Moment(NamedTuple):
    """A moment that a parameter has, see `Storage.zeros`."""

    slot: str
    storage: Storage
    shape: tuple[int, ...]
    size: int


def moments_to_be(param: Tensor, site: Site | None, plan: Plan, size: int) -> Iterator[Moment]:
    """Yield the moments that `init_state` makes for the same arguments."""
    if site is None:
        for slot in plan.rule.plain.slots:
            yield Moment(slot, plan.storage, tuple(param.shape), size or 1)
        return
    *batch, rows, _ = oriented(param, site.layout.wide)[1].shape
    for slot in plan.slots:
        yield Moment(slot, plan.storage, (*batch, rows, plan.projector.width(site)), 0)
    for slot in plan.feed.slots:
        yield Moment(slot, plan.feed_storage, (*batch, rows, site.cols), 0)


def zero_count(device: torch.device) -> Tensor:
    """Return a step count of zero."""
    return torch.zeros((), dtype=torch.float32, device=device)


def step_device(param: Tensor, moments: State | None, group: Group, plan: Plan) -> torch.device:
    """Return where the counts live: on the host, except where a kernel or a graph reads them.

    Counts of a parameter on "meta" are real numbers on the host, so that it can be stepped.

    Args:
        param, group, plan: its own.
        moments: of a parameter that is not projected, as they are stored; None for others.
    """
    host = torch.device("cpu")
    if param.is_meta:
        return host
    if group["capturable"]:
        return param.device
    if moments is not None and plan.rule.plain.counts_on_device(param, moments, group):
        return param.device
    return host


def template(
    param: Tensor, site: Site | None, group: Group, plan: Plan, held: Layout | None = None
) -> State:
    """Return the result of `init_state` on the "meta" device: keys, shapes and dtypes, no memory.

    Without `held` it is the state of the whole parameter, else of the part that a process holds.
    """
    meta = torch.device("meta")
    site = None if site is None else replace(site, device=meta)
    if held is None or held.mesh is None:
        like = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=meta)
    else:
        like = torch.empty(held.held, dtype=param.dtype, device=meta)
    state = init_state(like, site, group, plan, param.numel())
    if site is not None and held is not None and held.mesh is not None:
        for key in plan.each(group).cut:
            state[key] = held.columns_of(state[key])
    return state


FIXED = ("min_dim", "shard_basis", "capturable")
"""Settings on which a state depends, beside the rank and what a plan holds."""


def wants(group: Group, plan: Plan) -> tuple[Any, ...]:
    """Return what the states of a group depend on."""
    rank = rank_asked(group)
    return (plan, type(rank), rank, *(group[key] for key in FIXED))


def misfit(param: Tensor, site: Site | None, state: State, group: Group, plan: Plan) -> str | None:
    """Return what in a state does not fit its parameter, as the start of a sentence, or None.

    Keys that no method has belong to a wrapper, and are left alone.
    """
    at_times: tuple[str, ...] = ()  # moments that are there only in a matrix's turn
    if site is not None:
        step = state.get("step", 0)
        site = replace(site, step=max(0, int(step) - 1) if is_one_number(step) else 0)
        at_times = plan.slots if plan.takes_turns else ()
    wanted = template(param, site, group, plan)
    if strange := [key for key in state if key not in wanted and key in owned()]:
        number = decided_by(strange[0], wanted, param, site, group, plan)
        why = (
            f"does not go with {number}={group[number]!r}"
            if number
            else "belongs to another method"
        )
        return f"{strange[0]!r} {why} in"
    for key, like in wanted.items():
        held = state.get(key)
        if held is None:
            number = decided_by(key, wanted, param, site, group, plan)
            why = f", which goes with {number}={group[number]!r}," if number else ""
            return f"there is no {key!r}{why} in"
        kind, called = (Tensor, "tensor") if isinstance(like, Tensor) else (Real, "number")
        if not isinstance(held, kind):
            return f"{key!r} is of type {type(held).__name__}, and should be a {called}, in"
    counter = step_device(param, state if site is None else None, group, plan)
    for key, like in wanted.items():
        held = state[key]
        if not isinstance(like, Tensor):
            continue
        home = counter if key in ("step", "age") else param.device
        axes = -1 if key.partition(".")[0] in at_times else None
        for what, there, here in (
            ("shape", tuple(held.shape[:axes]), tuple(like.shape[:axes])),
            ("dtype", held.dtype, like.dtype),
            ("device", held.device, home),
        ):
            if there != here:
                return f"{key!r} has the {what} {there}, and should have {here}, in"
    return None


def is_one_number(value: Any) -> bool:
    """Return whether a value is a number, or a tensor of one."""
    return is_real(value) or (isinstance(value, Tensor) and value.numel() == 1)


def decided_by(
    key: str, wanted: State, param: Tensor, site: Site | None, group: Group, plan: Plan
) -> str | None:
    """Return the number that decides, by being None or not, whether a state has a key, if any.

    Args:
        key: of a state.
        wanted: the state that the parameter should have, see `template`.
        param, site, group, plan: of the parameter.
    """
    for name in PARTS if site is not None else ():
        part = getattr(plan, name)
        for found, number in numbers_of(part).items():
            if not number.good(None):
                continue
            absent = getattr(part, number.field) is None
            other = next(filter(number.good, (0.5, 1.0, 2.0)), None) if absent else None
            changed = replace(plan, **{name: with_numbers(part, {found: other})})
            if (key in template(param, site, group, changed)) != (key in wanted):
                return found
    return None


@cache
def owned() -> frozenset[str]:
    """Return every key that the state of some method has."""
    parts = [part for registry in PARTS.values() for part in registry.values()]
    slots = {slot for part in parts for slot in getattr(part, "slots", ())}
    keys = {key for part in parts for key in getattr(part, "kinds", {})}
    keys.update(key for length in LENGTHS.values() for key in length.keys)
    found = {key for slot in slots for form in forms(slot) for key in form}
    return frozenset({*COUNTED, *keys, *found})
