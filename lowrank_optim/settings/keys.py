"""Keys of a group: keys of other packages, and errors for keys that would be ignored."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from ..parts.checks import (
    SettingError,
    fail,
)
from ..parts.types import Group
from .values import CHECKS, NUMBERS

KNOWN_KEYS = frozenset({"params", "param_names", "foreach", "fused", "stage"})
"""Group keys that torch and trainers put beside the settings."""


FOREIGN = {
    "beta1": "use 'betas', a pair",
    "beta2": "use 'betas', a pair",
    "proj": 'use \'projector\' ("svd", "power", "random", ...)',
    "scale_type": "use ApolloAdamW, with rank 1 for one factor a tensor",
    "density": "use 'rank' with a float: the share of the projected axis",
    "state_free": "pass it to the constructor, or put residual=StateFree(...) in the group",
    "momentum_dtype": "pass it to the constructor, or put feed=ErrorFeedback(...) in the group",
    "error_dtype": "pass it to the constructor, or put feed=GeneralErrorFeedback(...) in the group",
    "process_group": "pass it to the constructor, it belongs to the whole optimizer",
}
"""Keys that other packages, or our constructors, read elsewhere: silence would be a trap."""


NOT_OFFERED = ("amsgrad", "differentiable")
"""Settings of torch's AdamW that may be False here."""


KEPT = ("skipped_steps", "grad_norm")
"""What an optimizer writes into its groups, beside `state_version`."""


PROJ_TYPES = {"std": "auto", "reverse_std": "reverse", "left": "left", "right": "right"}


def translate(group: dict[str, Any], where: str) -> None:
    """Rewrite the keys of galore_torch and fira to ours, in place: `alpha`, `proj_type`."""
    if "alpha" in group:
        if "scale" in group:
            raise SettingError(f"both 'scale' and 'alpha'{where}: they are the same, keep one")
        group["scale"] = group.pop("alpha")
    if "proj_type" in group:
        if "side" in group:
            raise SettingError(f"both 'side' and 'proj_type'{where}: they are the same, keep one")
        kind = group.pop("proj_type")
        if kind not in PROJ_TYPES:
            raise fail(
                where, "proj_type", kind, "one of 'std', 'reverse_std', 'left', 'right'; "
                "projecting both axes ('full') is not offered"
            )  # fmt: skip
        group["side"] = PROJ_TYPES[kind]


def check_keys(group: Group, where: str, read: Collection[str] = ()) -> None:
    """Raise SettingError for a group key that looks like a misspelt or misplaced setting.

    Any other unknown key is left alone, as torch does: trainers keep their own things there, also
    under names that contain the name of a setting, such as `lr_scale` and `init_weight_decay`.

    Args:
        group: its keys are looked at, and values of some.
        where: names it in a message.
        read: the numbers that parts of the group read.
    """
    for key in group:
        if key in CHECKS or key in KNOWN_KEYS or key in read:
            continue
        if key in NUMBERS:
            near = nearest(key)
            raise SettingError(
                f"group key {key!r}{where} is not read by what the group has: it is a number of "
                f"{' and '.join(NUMBERS[key])}"
                + (
                    f"; did you mean {near!r}?"
                    if near
                    else ". Take one of them, or remove the key; a wrapper that keeps a number of "
                    "its own in the groups has to give it another name"
                )
            )
        if key in FOREIGN:
            raise SettingError(f"group key {key!r}{where} is not read here: {FOREIGN[key]}")
        if key in NOT_OFFERED:
            if group[key]:
                raise SettingError(f"{key}=True{where}: {key} is not offered")
            continue
        near = nearest(key, read)
        if near is not None and not set(near.split("_")) < set(key.lower().split("_")):
            raise SettingError(f"unknown group key {key!r}{where}: did you mean {near!r}?")


def check_kept(group: Group, where: str, version: int) -> None:
    """Raise SettingError for what an optimizer keeps in its groups by itself.

    A copy of the groups of an optimizer has all of it, with the version of what is kept.

    Args:
        group: settings of a new group, as they were given.
        where: names it in a message.
        version: of the layout.
    """
    given = group.get("state_version", version)
    if given != version:
        raise SettingError(
            f"state_version={given!r}{where}: this package writes {version}. The optimizer keeps "
            "it by itself: remove the key, or load a checkpoint with load_state_dict"
        )
    for key in KEPT if "state_version" not in group else ():
        if key in group:
            raise SettingError(
                f"{key}={group[key]!r}{where}: the optimizer keeps it by itself, and a checkpoint "
                "restores it: remove the key"
            )


def check_unknown(keywords: dict[str, Any], name: str) -> None:
    """Raise TypeError, as Python does, for keywords of a constructor that are no settings.

    Args:
        keywords: what is left over.
        name: name of the class that was called.
    """
    for key in keywords:
        near = nearest(key)
        hint = (
            FOREIGN.get(key)
            or number_hint(key)
            or (f"did you mean {near!r}?" if near else "it has no such setting")
        )
        raise TypeError(f"{name}() got an unexpected keyword argument {key!r}: {hint}")


def number_hint(key: str) -> str:
    """Return a hint where a number of parts may be given; "" for any other key."""
    return f"put it into a group that has {' or '.join(NUMBERS[key])}" if key in NUMBERS else ""


def nearest(key: str, read: Iterable[str] = ()) -> str | None:
    """Return the setting, or number that is read, whose name is nearly the key; None for none."""
    near = difflib.get_close_matches(key.lower(), [*CHECKS, *read], n=1, cutoff=0.8)
    return near[0] if near else None
