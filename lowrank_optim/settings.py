"""The settings of a parameter group: what each may be, and what is said when it is not."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .auto_rank import AutoRank
from .checks import bytes_in, is_real
from .feeds import FEEDS, Feed
from .plan import Group, Plan
from .projectors import PROJECTORS
from .protocols import Projector, Residual, Rule
from .residuals import RESIDUALS
from .rules import RULES
from .storage import DTYPES, FEED_STORAGES, STORAGES

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

KNOWN_KEYS = frozenset({"params", "param_names", "foreach", "fused", "lr_scale", "initial_lr"})
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

PROJ_TYPES = {"std": "auto", "reverse_std": "reverse", "left": "left", "right": "right"}


class SettingError(ValueError):
    """A setting that cannot be used."""


def fail(where: str, key: str, value: Any, wanted: str) -> SettingError:
    """Return the error for a bad value, naming the place."""
    return SettingError(f"{key}={value!r}{where}: {key} must be {wanted}")


def number(wanted: str, good: Callable[[float], bool]) -> Callable[[str, Any, str], Any]:
    """Return a check for a real number."""

    def check(key: str, value: Any, where: str) -> Any:
        if not is_real(value) or not good(value):
            raise fail(where, key, value, wanted)
        return float(value)

    return check


def learning_rate(key: str, value: Any, where: str) -> Any:
    """Check lr: a number or a tensor of one element, whose value is looked at on the CPU only."""
    check = number("a number of at least 0, or a tensor of one", lambda x: 0 <= x < math.inf)
    if not isinstance(value, Tensor):
        return check(key, value, where)
    if value.numel() != 1:
        raise fail(where, key, value, "a number of at least 0, or a tensor of one")
    if value.device.type == "cpu":
        check(key, value.item(), where)
    return value


def betas(key: str, value: Any, where: str) -> tuple[float, float]:
    """Check betas: two numbers in [0, 1)."""
    try:
        first, second = (float(beta) for beta in value)
    except (TypeError, ValueError):
        raise fail(where, key, value, "two numbers in [0, 1)") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise fail(where, key, value, "two numbers in [0, 1)")
    return first, second


def rank(key: str, value: Any, where: str) -> int | float | AutoRank | None:
    """Check rank: None, an int from 1, a float in (0, 1], "auto" or an AutoRank."""
    if value is None or isinstance(value, AutoRank):
        return value
    if value == "auto":
        return AutoRank()
    wanted = (
        "None, an int of at least 1, a float in (0, 1], a share of the projected axis, "
        '"auto" or an AutoRank'
    )
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


def integer(least: int) -> Callable[[str, Any, str], Any]:
    """Return a check for an integer of at least `least`."""

    def check(key: str, value: Any, where: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise fail(where, key, value, f"an int of at least {least}")
        return int(value)

    return check


def flag(key: str, value: Any, where: str) -> Any:
    """Check a boolean."""
    if not isinstance(value, bool):
        raise fail(where, key, value, "True or False")
    return value


def one_of(*choices: str) -> Callable[[str, Any, str], Any]:
    """Return a check for one of some words."""

    def check(key: str, value: Any, where: str) -> Any:
        if value not in choices:
            raise fail(where, key, value, "one of " + ", ".join(map(repr, choices)))
        return value

    return check


def part(registry: dict[str, Any], method: str) -> Callable[[str, Any, str], Any]:
    """Return a check for a name in a registry, or an object that has the named method."""

    def check(key: str, value: Any, where: str) -> Any:
        if isinstance(value, str):
            if value in registry:
                return value
        elif callable(getattr(value, method, None)) and not isinstance(value, type):
            if type(value).__hash__ is None:
                raise fail(where, key, value, "hashable, as a frozen dataclass is")
            return value
        names = ", ".join(map(repr, registry))
        raise fail(where, key, value, f"one of {names}, or an object with a method `{method}`")

    return check


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

    Any other unknown key is left alone, as torch does: trainers keep their own things there.
    """
    for key in group:
        if key in CHECKS or key in KNOWN_KEYS:
            continue
        if key in FOREIGN:
            raise SettingError(f"group key {key!r}{where} is not read here: {FOREIGN[key]}")
        if key in ("amsgrad", "differentiable"):
            if group[key]:
                raise SettingError(f"{key}=True{where}: {key} is not offered")
            continue
        if key.endswith(("_mult", "_rate")):
            continue
        near = difflib.get_close_matches(key.lower(), CHECKS, n=1, cutoff=0.8)
        if near:
            raise SettingError(f"unknown group key {key!r}{where}: did you mean {near[0]!r}?")


def check_values(group: dict[str, Any], where: str) -> None:
    """Check every setting of a group and bring it to its normal form, in place."""
    for key, check in CHECKS.items():
        if key in group:
            group[key] = check(key, group[key], where)
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
    share = group["rank"]
    if isinstance(share, AutoRank):
        check_auto(plan, where)
    elif group["state_budget"] is not None and share is not None:
        raise SettingError(f'state_budget{where} belongs to rank="auto", not to rank={share}')
    if plan.projector.whole and not plan.projector.everything and isinstance(share, int):
        raise fail(where, "rank", share, "a float in (0, 1], the share of matrices that are active")
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


def signature(group: Group) -> tuple[Any, ...]:
    """Return what tells whether a setting has been replaced since it was checked."""
    values = (group[key] for key in CHECKS)
    return tuple(id(value) if isinstance(value, Tensor) else value for value in values)


def plan_of(group: Group) -> Plan:
    """Return the plan of a group; equal settings give the same object.

    Raises:
        SettingError: parts that do not go together, or a value set later that is none of ours.
    """
    for key, registry in PARTS.items():
        if isinstance(group[key], str) and group[key] not in registry:
            names = ", ".join(map(repr, registry))
            raise fail("", key, group[key], f"one of {names}, or an object")
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
    feed = FEEDS[feed] if isinstance(feed, str) else feed
    kept = dtype if feed.dtype is None else feed.dtype
    if kept not in FEED_STORAGES:
        names = ", ".join(repr(name) for name in FEED_STORAGES if name)
        raise fail(f" of the feed {type(feed).__name__}", "dtype", kept, f"None or one of {names}")
    return Plan(
        feed=feed,
        rule=RULES[rule] if isinstance(rule, str) else rule,
        projector=PROJECTORS[projector] if isinstance(projector, str) else projector,
        residual=RESIDUALS[residual] if isinstance(residual, str) else residual,
        storage=STORAGES[dtype],
        feed_storage=FEED_STORAGES[kept],
        side=side,
        on_refresh=on_refresh,
    )


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
        **({"rank": text_of(group["rank"])} if isinstance(group["rank"], AutoRank) else {}),
    }


def text_of(part: Any) -> str:
    """Return an object as `Name(settings)`, or `Name()` where its text might hold an address."""
    return repr(part) if is_dataclass(part) else f"{type(part).__name__}()"


def kind_of(text: str) -> str:
    """Return the name in a text of `text_of`: what decides the meaning of the state."""
    return text.partition("(")[0]
