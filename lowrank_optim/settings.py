"""The settings of a parameter group: what each may be, and what is said when it is not."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .parts.checks import (
    SettingError,
    as_text,
    betas,
    bytes_in,
    fail,
    flag,
    integer,
    is_real,
    learning_rate,
    made_from,
    number,
    one_of,
    text_of,
)
from .parts.feeds import FEEDS, Feed
from .parts.plan import Plan
from .parts.projectors import PROJECTORS
from .parts.protocols import Projector, Residual, Rule
from .parts.rank import AutoRank, rank_of
from .parts.residuals import RESIDUALS
from .parts.rules import RULES
from .parts.storage import DTYPES, FEED_STORAGES, STORAGES
from .parts.types import Group

PARTS: dict[str, dict[str, Any]] = {
    "feed": FEEDS,
    "rule": RULES,
    "projector": PROJECTORS,
    "residual": RESIDUALS,
}
SIDES = ("auto", "left", "right", "reverse")
ON_REFRESH = ("keep", "reset", "rotate", "align")
STRUCTURE = ("rank", "feed", "rule", "projector", "residual", "side", "on_refresh")
"""Settings that decide what the state means: a checkpoint must agree with them."""


def rank(key: str, value: Any, where: str) -> int | float | str | None:
    """Check rank: None, an int from 1, a float in (0, 1], "auto" or an AutoRank, kept as text."""
    if value is None:
        return value
    wanted = (
        "None, an int of at least 1, a float in (0, 1], a share of the projected axis, "
        '"auto" or an AutoRank'
    )
    if isinstance(value, (str, AutoRank)):
        try:
            return text_of(rank_of(value))
        except (TypeError, ValueError):
            raise fail(where, key, value, wanted) from None
    if not is_real(value):
        raise fail(where, key, value, wanted)
    whole = isinstance(value, numbers.Integral)
    if not (value >= 1 if whole else 0 < value <= 1):
        raise fail(where, key, value, wanted)
    return int(value) if whole else float(value)


def state_budget(key: str, value: Any, where: str) -> int | None:
    """Check state_budget and return it in bytes."""
    if value is None:
        return None
    number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    found = int(value) if number else bytes_in(value) if isinstance(value, str) else None
    if not found or found < 0:
        raise fail(where, key, value, 'None, a number of bytes above 0, or a text such as "2GiB"')
    return found


def part(registry: dict[str, Any], method: str) -> Callable[[str, Any, str], Any]:
    """Return a check for a name in a registry, or an object that has the named method.

    One of ours becomes its text, so that groups hold plain data; one of the user's stays.
    """
    kinds = kinds_in(registry)

    def check(key: str, value: Any, where: str) -> Any:
        if isinstance(value, str):
            if value in registry:
                return value
            try:
                found = made_from(value, kinds)
            except (TypeError, ValueError) as error:
                raise SettingError(f"{key}={value!r}{where}: {error}") from None
            if found is not None:
                return value
        elif callable(getattr(value, method, None)) and not isinstance(value, type):
            if type(value).__hash__ is None:
                raise fail(where, key, value, "hashable, as a frozen dataclass is")
            return as_text(value, kinds)
        names = ", ".join(map(repr, registry))
        raise fail(where, key, value, f"one of {names}, or an object with a method `{method}`")

    return check


def kinds_in(registry: dict[str, Any]) -> list[type]:
    """Return the classes of the parts in a registry."""
    return [type(each) for each in registry.values()]


def state_dtype(key: str, value: Any, where: str) -> str | None:
    """Check state_dtype and return it as a name, which a checkpoint can hold."""
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if name is not None and (not isinstance(name, str) or name not in STORAGES):
        names = ", ".join(f"torch.{name}" for name in DTYPES)
        raise fail(where, key, value, f'None, "8bit" or one of {names}')
    return name


CHECKS: dict[str, Callable[[str, Any, str], Any]] = {
    "lr": learning_rate,
    "betas": betas,
    "eps": number("at least 0", lambda x: 0 <= x < math.inf),
    "weight_decay": number("at least 0", lambda x: 0 <= x < math.inf),
    "rank": rank,
    "min_dim": integer(1),
    "state_budget": state_budget,
    "update_proj_gap": integer(1),
    "scale": number("at least 0", lambda x: 0 <= x < math.inf),
    "feed": part(FEEDS, "feed"),
    "projector": part(PROJECTORS, "refresh"),
    "rule": part(RULES, "direction"),
    "residual": part(RESIDUALS, "update"),
    "side": one_of(*SIDES),
    "on_refresh": one_of(*ON_REFRESH),
    "state_dtype": state_dtype,
    "stochastic_rounding": flag,
    "skip_nonfinite": flag,
    "maximize": flag,
    "capturable": flag,
    "seed": integer(0),
    "impl": one_of("auto", "eager", "triton"),
    "stagger": flag,
    "shard_basis": flag,
    "skipped_steps": integer(0),
}


RATES = ("lr", "betas", "eps", "weight_decay", "scale", "maximize", "skipped_steps")
"""Settings that change nothing but numbers of a step."""


def check_values(group: dict[str, Any], where: str, least_lr: float = 0.0) -> None:
    """Check every setting of a group and bring it to its normal form, in place.

    Args:
        group: the settings, beside others.
        where: names the group in a message.
        least_lr: the least rate; a schedule may go below 0, as torch lets it.
    """
    for key, check in CHECKS.items():
        if key in group:
            group[key] = check(key, group[key], where)
    lr = group["lr"]
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) < least_lr:
        raise fail(where, "lr", float(lr), "a number of at least 0, or a tensor of one")
    try:
        plan = plan_of(group)
    except ValueError as error:
        raise SettingError(f"{error}{where}") from None
    if group["capturable"] and not plan.projector.captures:
        raise SettingError(
            f"capturable=True{where} does not go with the projector "
            f"{type(plan.projector).__name__}: a refresh makes tensors that a captured step would "
            "not find"
        )
    if group["capturable"] and not plan.feed.captures:
        raise SettingError(
            f"capturable=True{where} does not go with the feed {type(plan.feed).__name__}, which "
            "reads the number of updates on the host"
        )
    share = rank_of(group["rank"])
    if isinstance(share, AutoRank):
        check_auto(plan, where)
    elif group["state_budget"] is not None and share is not None:
        raise SettingError(f'state_budget{where} belongs to rank="auto", not to rank={share}')
    if plan.projector.whole and not plan.projector.everything and isinstance(share, int):
        raise fail(where, "rank", share, "a float in (0, 1], the share of matrices that are active")
    if group.get("foreach") and group.get("fused"):
        raise SettingError(f"foreach=True and fused=True{where}: take one of them, or neither")
    if group.get("foreach") and isinstance(group["lr"], Tensor):
        raise SettingError(f"foreach=True{where}: with lr a tensor, torch's AdamW needs fused=True")


def check_auto(plan: Plan, where: str) -> None:
    """Raise SettingError if ranks cannot be chosen from what a projector learns."""
    name = type(plan.projector).__name__
    if not plan.projector.learns:
        raise SettingError(
            f'rank="auto"{where} does not go with the projector {name}, which learns nothing of '
            'the gradient: choose "svd", "power" or "dct"'
        )
    if plan.on_refresh == "align":
        raise SettingError(
            f'rank="auto"{where} does not go with on_refresh="align": bases of different ranks '
            'cannot be aligned, choose "rotate", "keep" or "reset"'
        )


def plan_of(group: Group) -> Plan:
    """Return the plan of a group; equal settings give the same object.

    Raises:
        SettingError: parts that do not go together, or a value set later that is none of ours.
    """
    return _plan(
        group["feed"],
        group["rule"],
        group["projector"],
        group["residual"],
        group["state_dtype"],
        group["side"],
        group["on_refresh"],
    )


@lru_cache(maxsize=256)
def _plan(
    feed: Feed | str,
    rule: Rule | str,
    projector: Projector | str,
    residual: Residual | str,
    dtype: str | None,
    side: str,
    on_refresh: str,
) -> Plan:
    fed: Feed = part_of("feed", feed)
    kept = dtype if fed.dtype is None else fed.dtype
    if kept not in FEED_STORAGES:
        names = ", ".join(repr(name) for name in FEED_STORAGES if name)
        raise fail(f" of the feed {type(fed).__name__}", "dtype", kept, f"None or one of {names}")
    try:
        return Plan(
            feed=fed,
            rule=part_of("rule", rule),
            projector=part_of("projector", projector),
            residual=part_of("residual", residual),
            storage=STORAGES[dtype],
            feed_storage=FEED_STORAGES[kept],
            side=side,
            on_refresh=on_refresh,
        )
    except ValueError as error:
        raise SettingError(str(error)) from None


def part_of(key: str, value: Any) -> Any:
    """Return the part that a name, a text or an object in a group stands for."""
    value = CHECKS[key](key, value, "")
    registry = PARTS[key]
    if not isinstance(value, str):
        return value
    return registry[value] if value in registry else made_from(value, kinds_in(registry))


def described(group: Group) -> dict[str, str]:
    """Return the structural settings as text that a checkpoint can hold."""
    plan = plan_of(group)
    return {
        "feed": text_of(plan.feed),
        "rule": text_of(plan.rule),
        "projector": text_of(plan.projector),
        "residual": text_of(plan.residual),
        "side": plan.side,
        "on_refresh": plan.on_refresh,
    }


def kind_of(text: str) -> str:
    """Return the name in a text of `text_of`: what decides the meaning of the state."""
    return text.partition("(")[0]


KNOWN_KEYS = frozenset({"params", "param_names", "foreach", "fused", "stage"})
"""Group keys that torch and trainers put beside the settings."""


FOREIGN = {
    "beta1": "use 'betas', a pair",
    "beta2": "use 'betas', a pair",
    "proj": 'use \'projector\' ("svd", "power", "random", ...)',
    "scale_type": "use ApolloAdamW, with rank 1 for one factor a tensor",
    "density": "use 'rank' with a float: the share of the projected axis",
    "limiter": "pass it to the constructor, or put residual=NormScaled(limiter=...) in the group",
    "state_free": "pass it to the constructor, or put residual=StateFree(...) in the group",
    "state_free_scale": "pass it to the constructor, or put residual=StateFree(...) in the group",
}
"""Keys that other packages, or our presets, read elsewhere: silence would be a trap."""


NOT_OFFERED = ("amsgrad", "differentiable")
"""Settings of torch's AdamW that may be False here."""


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


def check_keys(group: Group, where: str) -> None:
    """Raise SettingError for a group key that looks like a misspelt or misplaced setting.

    Any other unknown key is left alone, as torch does: trainers keep their own things there, also
    under names that have that of a setting in them, such as `lr_scale` and `init_weight_decay`.
    """
    for key in group:
        if key in CHECKS or key in KNOWN_KEYS:
            continue
        if key in FOREIGN:
            raise SettingError(f"group key {key!r}{where} is not read here: {FOREIGN[key]}")
        if key in NOT_OFFERED:
            if group[key]:
                raise SettingError(f"{key}=True{where}: {key} is not offered")
            continue
        near = nearest(key)
        if near is not None and not set(near.split("_")) < set(key.lower().split("_")):
            raise SettingError(f"unknown group key {key!r}{where}: did you mean {near!r}?")


def check_unknown(keywords: dict[str, Any], name: str) -> None:
    """Raise TypeError, as Python does, for keywords of a constructor that are no settings.

    Args:
        keywords: what is left over.
        name: of the class that was called.
    """
    for key in keywords:
        near = nearest(key)
        hint = FOREIGN.get(key) or (f"did you mean {near!r}?" if near else "it has no such setting")
        raise TypeError(f"{name}() got an unexpected keyword argument {key!r}: {hint}")


def nearest(key: str) -> str | None:
    """Return the setting whose name is nearly that of a key, if there is one."""
    near = difflib.get_close_matches(key.lower(), CHECKS, n=1, cutoff=0.8)
    return near[0] if near else None
