"""Saving and loading: plain tensors and numbers, unchanged dtypes, and no silent mismatch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ..engine.members import name_of
from ..engine.session import Session, session_of
from ..engine.sites import sites_of
from ..functional.views import Shape
from ..parts.checks import SettingError, is_real
from ..parts.plan import Plan
from ..parts.rank import subspace_of
from ..parts.types import Group
from ..settings.keys import NOT_OFFERED, check_keys
from ..settings.plans import check_values, described, numbers_in, plan_of
from ..settings.values import CHECKS, STRUCTURE, class_in
from .differences import news
from .pairing import check_form, ids_of, paired
from .states import Saved, check, take
from .versions import BEFORE, STATE_VERSION, current

LIVE = (*STRUCTURE, "state_dtype", "impl", "capturable", "foreach", "fused", "shard_basis")
"""Settings that stay as they are here: what the state means, and how this machine steps it."""


def portable(session: Session, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose groups hold text where they held objects."""
    groups = session.placed(state_dict["param_groups"])
    groups = [{**g, **described(g), "state_version": STATE_VERSION} for g in groups]
    return {**state_dict, "param_groups": groups}


def load(optimizer: Optimizer, state_dict: dict[str, Any], *, tells: bool = True) -> None:
    """Load through torch's own method, which runs the user's hooks.

    Our hooks stand innermost: after the user's pre-hooks the checkpoint is checked, and handed on
    without states, which torch would cast to the dtype of the parameter; before the user's
    post-hooks the states are taken from it.

    Args:
        optimizer: whose state is replaced.
        state_dict: the checkpoint, which is not changed.
        tells: whether to warn, at the caller's caller, of settings that were others here.
    """
    live = session_of(optimizer).placed(optimizer.param_groups)
    checkpoint: list[Checked] = []

    def check_and_keep(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        check_form(incoming)
        checkpoint.append(checked(optimizer, incoming))
        ids = set(ids_of(incoming["param_groups"]))
        others = {key: value for key, value in incoming["state"].items() if key not in ids}
        return {**incoming, "state": others, "param_groups": checkpoint[0].groups}

    def restore(_: Any) -> None:
        given = checkpoint[0].groups
        for group, own, new in zip(optimizer.param_groups, live, given, strict=True):
            loaded = {k: own[k] if k in LIVE or k not in new else group[k] for k in own}
            rest = {k: v for k, v in group.items() if k not in own}
            group.clear()
            group.update(loaded | rest)  # in the order of before: a checkpoint is the same text
        for saved in checkpoint[0].states:
            take(saved, optimizer.state[saved.param])

    if not isinstance(state_dict, Mapping):
        raise SettingError(f"a {type(state_dict).__name__} is no state dict of an optimizer")
    before = optimizer.register_load_state_dict_pre_hook(check_and_keep)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        before.remove()
        after.remove()
    session_of(optimizer).loaded()
    if tells and (differences := news(live, checkpoint[0].settings, LIVE)):
        warnings.warn(differences, stacklevel=3)


class Checked(NamedTuple):
    """What is taken of a checkpoint that fits.

    Attributes:
        settings: all settings of the checkpoint in normal form, for each group.
        groups: the settings that are taken, as torch is to load them.
        states: of all parameters that have a state.
    """

    settings: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    states: list[Saved]


def checked(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Checked:
    """Return what is to be taken of a checkpoint.

    Raises:
        SettingError: it does not fit. Nothing is changed then.
    """
    found = Checked([], [], [])
    ours = any("projector" in group for group in state_dict["param_groups"])
    try:
        own = paired(optimizer.param_groups, state_dict)
        here = session_of(optimizer).placed(optimizer.param_groups)
        for index, (group, there) in enumerate(zip(here, own["param_groups"], strict=True)):
            saved = current(there, group)
            check_structure(group, saved, index)
            merged = merged_settings(group, saved, f" in group {index} of the checkpoint")
            taken = {k: merged.get(k, v) for k, v in saved.items() if k not in LIVE}
            older = {k: merged[k] for k in BEFORE if k in merged and "projector" in saved}
            found.settings.append({**saved, **taken})
            found.groups.append({**older, **taken, "params": saved["params"]})
            found.states.extend(states_in(optimizer, merged, saved, own["state"], index))
    except SettingError as error:
        if ours:
            raise
        raise SettingError(
            f"the checkpoint is one of another optimizer, whose state does not fit a "
            f"{type(optimizer).__name__} ({error}). lowrank_optim.import_state reads checkpoints "
            "of galore-torch, fira and apollo-torch; of any other, such as AdamW, take the weights "
            "and start without the optimizer's state"
        ) from None
    return found


def check_structure(group: Group, saved: Group, index: int) -> None:
    """Raise SettingError if a group of a checkpoint was made with other parts than ours."""
    for key, value in described(group).items():
        if key in saved and class_in(str(saved[key])) != class_in(value):
            raise SettingError(
                f"the checkpoint was made with {key}={saved[key]} in group {index}, this "
                f"optimizer has {value}: build it with the checkpoint's setting to resume, or "
                "start without its optimizer state"
            )
    there = meant(saved).get("length", group["length"])
    sampled = group["rank"] is not None and "adamw" in (there, group["length"])
    if there != group["length"] and sampled:
        raise SettingError(
            f"the checkpoint was made with length={there!r} in group {index}, this optimizer has "
            f'{group["length"]!r}: with "adamw" a sample of each matrix is kept. Build it with the '
            "checkpoint's setting to resume, or start without its optimizer state"
        )
    plan, numbers = plan_of(group), numbers_in(group)
    for key in (key for key in plan.optional if key in numbers and key in saved):
        if (saved[key] is None) != (group[key] is None):
            raise SettingError(
                f"the checkpoint was made with {key}={saved[key]} in group {index}, this optimizer "
                f"has {group[key]}: with and without one, other things are kept. Build it with the "
                "checkpoint's setting to resume, or start without its optimizer state"
            )
    names = {key: saved[key] is not False for key in NOT_OFFERED if key in saved}
    where = f" in group {index} of the checkpoint"
    check_keys({**dict.fromkeys(saved), **names}, where, numbers)


def meant(saved: Group) -> dict[str, Any]:
    """Return a group of a checkpoint with what it means by not saying, if it is one of ours."""
    return {**(BEFORE if "projector" in saved else {}), **saved}


def merged_settings(group: Group, saved: Group, where: str) -> dict[str, Any]:
    """Return the checked settings of a group after the load: the checkpoint's, except live ones."""
    taken = meant(saved)
    merged = {key: taken.get(key, own) if key not in LIVE else own for key, own in group.items()}
    merged.update({key: group[key] for key in ("params", "param_names") if key in group})
    norm = merged["grad_norm"]
    if norm is not None and (not is_real(norm) or norm < 0):
        raise SettingError(f"grad_norm={norm!r}{where}: it must be None or a number of at least 0")
    if isinstance(merged["lr"], Tensor) and merged["lr"].is_meta:
        raise SettingError(f'lr{where} is on "meta", without a value')
    check_values(merged, where)
    CHECKS["state_dtype"]("state_dtype", saved.get("state_dtype"), where)
    if not isinstance(saved.get("rank"), str):
        CHECKS["rank"]("rank", saved.get("rank"), where)
    return merged


def states_in(
    optimizer: Optimizer, merged: Group, saved: Group, states: Mapping[Any, Any], index: int
) -> list[Saved]:
    """Return the states that the parameters of a group have in a checkpoint, checked."""
    plan = plan_of(merged)
    held = {
        param: states.get(key, {})
        for param, key in zip(merged["params"], saved["params"], strict=True)
    }
    found = []
    for place, (param, site) in enumerate(
        sites_of(merged, plan, session_of(optimizer).shared, states=held)
    ):
        name, shape = name_of(merged, index, place), tuple(param.shape)
        if "rank" in saved and not same_rank(shape, saved["rank"], merged, plan):
            ranks = f"rank {saved['rank']} in the checkpoint, {merged['rank']} here"
            raise SettingError(f"the ranks of {name} differ: {ranks}")
        if held[param]:
            found.append(Saved(name, param, site, held[param], merged, plan))
            check(found[-1])
    return found


def same_rank(shape: Shape, there: Any, group: Group, plan: Plan) -> bool:
    """Return whether the `rank` of a checkpoint and ours come to the same number of columns."""
    here, least = group["rank"], group["min_dim"]
    if isinstance(there, str) or isinstance(here, str):
        return isinstance(there, str) and isinstance(here, str)
    spaces = [
        subspace_of(shape, rank, plan.side, plan.projector.whole, plan.full, least)
        for rank in (there, here)
    ]
    return spaces[0] == spaces[1]
