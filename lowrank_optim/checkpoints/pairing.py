"""Which state of a checkpoint belongs to which parameter: by name, or by place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..parts.checks import SettingError
from ..parts.types import Group
from ..roles import WRAPPER

SHOWN = 3
"""Names that a message lists."""


def check_form(state_dict: Any) -> None:
    """Raise SettingError unless this is a state dict of an optimizer, with states by parameter."""
    if not isinstance(state_dict, Mapping):
        raise SettingError(f"a {type(state_dict).__name__} is no state dict of an optimizer")
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping):
        raise SettingError("a state dict has 'state', a dict, and 'param_groups', a list of dicts")
    for index, group in enumerate(groups):
        ids = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, (int, str)) for i in ids):
            raise SettingError(
                f"group {index} of the checkpoint is no dict with 'params', a list of numbers"
            )
        names = group.get("param_names", [str(key) for key in ids])
        texts = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if not texts or len(names) != len(ids):
            raise SettingError(f"'param_names' of group {index} of the checkpoint are no names")
    ids = ids_of(groups)
    if len(set(ids)) < len(ids):
        raise SettingError("the checkpoint has a parameter in its groups twice")
    for key in ids:
        if key in state and not isinstance(state[key], Mapping):
            raise SettingError(
                f"the state of parameter {key} is a {type(state[key]).__name__} in the checkpoint, "
                "not a dict: remove it there to start this parameter anew"
            )
    known = set(ids)
    lost = [k for k in state if isinstance(k, str) and k not in known and is_state(state[k])]
    if lost:
        raise SettingError(
            f"the checkpoint has states of {listed(lost)}, its groups have {listed(ids)}: a format "
            "that turns numbers into text, as JSON does, needs them turned back (flatten_state and "
            "unflatten_state do)"
        )


def is_state(value: Any) -> bool:
    """Return whether a value is the state of a parameter."""
    return isinstance(value, Mapping) and "step" in value


def ids_of(groups: Iterable[Group]) -> list[Any]:
    """Return what the groups of a state dict call their parameters."""
    return [key for group in groups for key in group["params"]]


def paired(groups: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose groups hold the parameters of these groups, in their order.

    With names on both sides a state goes to the parameter of the same name, else to the parameter
    in the same place. Settings come from the group of the same parameters, else of the same place,
    or of the one that holds them all if there are more groups here.

    Raises:
        SettingError: groups of other sizes; a name without a partner, except of a parameter
            which is frozen here, or has no state in the checkpoint.
    """
    saved, state = state_dict["param_groups"], state_dict["state"]
    here, there = bare_names(names_in(groups)), bare_names(names_in(saved))
    if here is None or there is None or any(isinstance(key, str) for key in ids_of(saved)):
        sizes = [[len(group["params"]) for group in some] for some in (saved, groups)]
        if sizes[0] != sizes[1]:
            raise SettingError(
                f"the checkpoint has groups of {sizes[0]} parameters, this optimizer of "
                f"{sizes[1]}: build it with the same groups"
            )
        return {**state_dict, "param_groups": [dict(group) for group in saved]}
    ids = dict(zip(there, ids_of(saved), strict=True))
    params = dict(zip(here, ids_of(groups), strict=True))
    only_here = [name for name in here if name not in ids and params[name].requires_grad]
    only_there = [name for name in there if name not in params and state.get(ids[name])]
    if only_here or only_there:
        raise SettingError(
            f"parameters without a partner: {listed(only_there)} in the checkpoint, "
            f"{listed(only_here)} here. Build the optimizer with the checkpoint's parameters, or "
            "take 'param_names' out of the checkpoint's groups to load by place"
        )
    found = []
    ours, theirs = (in_groups(*of) for of in ((here, groups), (there, saved)))
    for group, names, place in zip(groups, ours, partners(ours, theirs), strict=True):
        own = [ids.get(name, ("frozen", name)) for name in names]
        found.append({**saved[place], "params": own, "param_names": list(group["param_names"])})
    return {**state_dict, "param_groups": found}


def names_in(groups: Iterable[Group]) -> list[str] | None:
    """Return the names of all parameters; None if one has none, or two have the same."""
    names: list[str] = []
    for group in groups:
        own = group.get("param_names")
        if own is None or len(own) != len(group["params"]):
            return None
        names += own
    return names if len(set(names)) == len(names) else None


def bare_names(names: list[str] | None) -> list[str] | None:
    """Return names without the prefixes of wrappers; unchanged if that makes two names equal.

    Wrappers are torch.compile, checkpointing, FSDP and PEFT, and "module." of data parallelism.
    """
    if names is None:
        return None
    bare = [WRAPPER.sub("", name).lstrip(".") for name in names]
    while bare and all(name.startswith("module.") for name in bare):
        bare = [name.removeprefix("module.") for name in bare]
    return bare if len(set(bare)) == len(bare) else names


def in_groups(names: Sequence[str], groups: Sequence[Group]) -> list[list[str]]:
    """Return the names of all parameters, a list a group."""
    left = iter(names)
    return [[next(left) for _ in group["params"]] for group in groups]


def partners(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> list[int]:
    """Return for each group the place of the one in the checkpoint whose settings it takes.

    Args:
        ours, theirs: names of the parameters of each group.
    """
    here, there = ([frozenset(names) for names in some] for some in (ours, theirs))
    if len(set(there)) == len(there) and set(here) == set(there):
        return [there.index(names) for names in here]
    if len(here) == len(there):
        return list(range(len(here)))
    known = frozenset().union(*there)
    around = [[place for place, other in enumerate(there) if own & known <= other] for own in here]
    if not all(around):
        raise SettingError(
            f"the checkpoint has {len(there)} groups, this optimizer {len(here)} with parameters "
            "of several of them, so that it is not known whose settings they take: build it with "
            "the same groups"
        )
    return [places[0] for places in around]


def listed(names: Sequence[Any]) -> str:
    """Return the first few of some names, for a message."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return shown + more or "none"
