"""Whether the state of a parameter goes with the parameter and its group as they are now."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from ..parts.plan import COUNTED, Group, Plan, Site, State
from ..parts.storage import forms
from ..settings import PARTS
from .update import step_device, template

FIXED = ("rank", "min_dim", "shard_basis", "capturable")
"""Settings beside those of a plan on which a state depends."""


def wants(group: Group, plan: Plan) -> tuple[Any, ...]:
    """Return what the states of a group depend on."""
    return (plan, *(group[key] for key in FIXED))


def fitting(param: Tensor, state: State, wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what says that a state fits: as long as it is the same, nothing has to be compared."""
    held = [id(value) for value in state.values() if isinstance(value, Tensor)]
    return (held, param.dtype, param.shape, param.device, wanted)


def misfit(param: Tensor, site: Site | None, state: State, group: Group, plan: Plan) -> str | None:
    """Return what does not fit in the state of a parameter, as the start of a sentence, or None.

    Keys that belong to no part of any method are a wrapper's own, and left alone.
    """
    turns: tuple[str, ...] = ()  # moments that are there or not, as it is a matrix's turn
    if site is not None:
        site = replace(site, step=max(0, int(state.get("step", 0)) - 1))
        turns = plan.slots if plan.projector.whole and not plan.projector.everything else ()
    wanted = template(param, site, group, plan)
    if strange := [key for key in state if key not in wanted and key in owned()]:
        return f"{strange[0]!r} belongs to another method in"
    counter = step_device(param, state if site is None else None, group, plan)
    for key, like in wanted.items():
        held = state.get(key)
        if held is None:
            return f"there is no {key!r} in"
        if not isinstance(like, Tensor):
            continue
        home = counter if key in ("step", "age") else param.device
        axes = -1 if key.partition(".")[0] in turns else None
        for what, there, here in (
            ("shape", tuple(held.shape[:axes]), tuple(like.shape[:axes])),
            ("dtype", held.dtype, like.dtype),
            ("device", held.device, home),
        ):
            if there != here:
                return f"{key!r} has the {what} {there}, and should have {here}, in"
    return None


@cache
def owned() -> frozenset[str]:
    """Return every key that the state of some method has."""
    parts = [part for registry in PARTS.values() for part in registry.values()]
    slots = {slot for part in parts for slot in getattr(part, "slots", ())}
    keys = {key for part in parts for key in getattr(part, "kinds", {})}
    found = {key for slot in slots for form in forms(slot) for key in form}
    return frozenset({*COUNTED, *keys, *found})
