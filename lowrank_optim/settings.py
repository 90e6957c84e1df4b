"""The settings of a parameter group: what each may be, and what is said when it is not."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import replace
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
from .parts.numbers import (
    Number,
    bare_text,
    numbers_of,
    said_by,
    with_numbers,
)
from .parts.plan import Plan
from .parts.projectors import PROJECTORS
from .parts.protocols import Projector, Residual, Rule
from .parts.rank import AutoRank, rank_asked, rank_of
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
            rank_of(value)
        except (TypeError, ValueError):
            raise fail(where, key, value, wanted) from None
        return value if isinstance(value, str) else text_of(value)
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


WITH_NUMBERS = (*PARTS, "rank")
"""Settings that stand for parts with numbers."""


def readers_of_numbers() -> dict[str, list[str]]:
    """Return for each number of our parts what reads it, as it is written in a group."""
    found: dict[str, list[str]] = {key: ['rank="auto"'] for key in AutoRank.numbers}
    for setting, registry in PARTS.items():
        for each in registry.values():
            for key in numbers_of(each):
                found.setdefault(key, []).append(f"{setting}={type(each).__name__}(...)")
    return found


NUMBERS = readers_of_numbers()
"""Keys of the numbers of our parts, and what reads them."""

DERIVED = tuple(key for key, number in AutoRank.numbers.items() if number.derived)
"""Those of them from which more follows than a number of a step."""


def reading(group: Group) -> list[tuple[str, Any, Any]]:
    """Return (setting, what it says, part) of all parts that a group's steps read numbers of.

    Where nothing is projected, that is the rule of such parameters alone.
    """
    rule = part_of("rule", group["rule"])
    plain = [("rule", "", rule.plain)] if rule.plain is not rule else []
    if group["rank"] is None:
        return plain or [("rule", group["rule"], rule)]
    return [*((key, group[key], part_of(key, group[key])) for key in WITH_NUMBERS), *plain]


def default_of(key: str, value: Any) -> Any:
    """Return what a group gets for a setting of the constructor: parts without their numbers.

    The numbers follow by `placed`, where the group does not say otherwise.
    """
    if key not in WITH_NUMBERS or not isinstance(value, str) or value in names_of(key):
        return value
    return without_numbers(key, part_of(key, value))


def names_of(key: str) -> Container[str]:
    """Return the names that a setting may have in place of a part."""
    return PARTS.get(key, ("auto",))


def without_numbers(key: str, part: Any) -> str:
    """Return the text of one of our parts that says nothing of its numbers."""
    return "auto" if key == "rank" else bare_text(part)


def placed(
    group: Group, where: str, defaults: Group, before: Sequence[Group] = ()
) -> dict[str, Any]:
    """Return a group with the keys of ours, and the numbers of its parts beside them.

    A part of ours stands in a group as text without numbers, one of a user's own as it is. Each
    number is, in this order: that of its own key; what the part here says, an object or a text with
    numbers; the constructor's, where its part is of the same kind; the default of the class.

    Args:
        group: complete but for numbers.
        where: names it in a message.
        defaults: the constructor's settings.
        before: what this group, or those that it may come from, had when they were last looked at.
            A number that is there unchanged has not been asked for: it gives way to what a new part
            says, and goes with a part that is gone.

    Raises:
        SettingError: a number that is said twice and not alike, or that nothing in the group reads.
    """
    group = dict(group)
    translate(group, where)
    for key in WITH_NUMBERS:
        group[key] = CHECKS[key](key, group[key], where)
    parts = reading(group)
    read = {key: each for _, _, part in parts for key, each in numbers_of(part).items()}

    def asked(key: str) -> bool:
        return key in group and not any(key in old and old[key] == group[key] for old in before)

    for key, each in read.items():
        for other in set(each.also) & group.keys() - read.keys():
            if asked(key):
                raise SettingError(
                    f"both {key!r} and {other!r}{where}: they are the same, keep one"
                )
            group[key] = group.pop(other)
        if key in group:
            group[key] = each.check(key, group[key], where)
    for setting, value, part in parts:
        said, source = said_by(value, part), part
        if isinstance(value, str):
            made = part_of(setting, defaults[setting])
            alike = (made, getattr(made, "plain", None))
            source = next((other for other in alike if type(other) is type(part)), part)
        elif not before or any(old.get(setting) is value for old in before):
            said = {}
        for key, each in numbers_of(part).items():
            if key in said:
                if asked(key) and group[key] != said[key]:
                    raise SettingError(
                        f"{key}={group[key]!r}{where}, and {setting}={value!r} says {said[key]!r}: "
                        f'keep one, as in {setting}="{without_numbers(setting, part)}"'
                    )
                group[key] = said[key]
            elif key not in group:
                group[key] = getattr(source, each.field)
        if said and isinstance(value, str):
            group[setting] = without_numbers(setting, part)
    for key in [key for key in group if key in NUMBERS and key not in read and not asked(key)]:
        del group[key]
    check_keys(group, where, read)
    return group


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
    for key, each in numbers_in(group).items():
        if key in group:
            group[key] = each.check(key, group[key], where)
    try:
        asked = rank_asked(group)
    except ValueError as error:
        raise SettingError(f"rank={group['rank']!r}{where}: {error}") from None
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
    if isinstance(asked, AutoRank):
        check_auto(plan, where)
    elif group["state_budget"] is not None and asked is not None:
        raise SettingError(f'state_budget{where} belongs to rank="auto", not to rank={asked}')
    if plan.takes_turns and isinstance(asked, int):
        raise fail(where, "rank", asked, "a float in (0, 1], the share of matrices that are active")
    if group.get("foreach") and group.get("fused"):
        raise SettingError(f"foreach=True and fused=True{where}: take one of them, or neither")
    if group.get("foreach") and isinstance(group["lr"], Tensor):
        raise SettingError(f"foreach=True{where}: with lr a tensor, torch's AdamW needs fused=True")


def numbers_in(group: Group) -> dict[str, Number]:
    """Return the numbers that the steps of a group read, by key."""
    plan, rank = plan_of(group), rank_of(group["rank"])
    if rank is None:
        return plan.plain_numbers
    return {**plan.numbers, **plan.plain_numbers, **numbers_of(rank)}


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
    plan = _plan(
        group["feed"],
        group["rule"],
        group["projector"],
        group["residual"],
        group["state_dtype"],
        group["side"],
        group["on_refresh"],
    )
    other = tuple(
        (key, group[key])
        for key, absent in plan.optional.items()
        if key in group and (group[key] is None) != absent
    )
    return _with_structure(plan, other) if other else plan


@lru_cache(maxsize=256)
def _with_structure(plan: Plan, numbers: tuple[tuple[str, Any], ...]) -> Plan:
    """Return a plan whose parts know which of their numbers are None."""
    there = dict(numbers)
    return replace(plan, **{key: with_numbers(getattr(plan, key), there) for key in PARTS})


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
    if key == "rank":
        return rank_of(value)
    registry = PARTS[key]
    if not isinstance(value, str):
        return value
    return registry[value] if value in registry else made_from(value, kinds_in(registry))


def described(group: Group) -> dict[str, str]:
    """Return the structural settings as text that a checkpoint can hold."""
    plan = plan_of(group)
    return {
        **{key: bare_text(getattr(plan, key)) for key in PARTS},
        "side": plan.side,
        "on_refresh": plan.on_refresh,
    }


def class_in(text: str) -> str:
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
    "state_free": "pass it to the constructor, or put residual=StateFree(...) in the group",
    "length": "pass it to the constructor, or put rule=Muon(...) or Orthogonal(...) in the group",
    "momentum_dtype": "pass it to the constructor, or put feed=ErrorFeedback(...) in the group",
    "error_dtype": "pass it to the constructor, or put feed=GeneralErrorFeedback(...) in the group",
    "process_group": "pass it to the constructor, it is that of the whole optimizer",
}
"""Keys that other packages, or our constructors, read elsewhere: silence would be a trap."""


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


def check_keys(group: Group, where: str, read: Collection[str] = ()) -> None:
    """Raise SettingError for a group key that looks like a misspelt or misplaced setting.

    Any other unknown key is left alone, as torch does: trainers keep their own things there, also
    under names that have that of a setting in them, such as `lr_scale` and `init_weight_decay`.

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
                + (f"; did you mean {near!r}?" if near else ", take one of them or remove the key")
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


def check_unknown(keywords: dict[str, Any], name: str) -> None:
    """Raise TypeError, as Python does, for keywords of a constructor that are no settings.

    Args:
        keywords: what is left over.
        name: of the class that was called.
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
    """Return where a number of parts may be given; "" for any other key."""
    return f"put it into a group that has {' or '.join(NUMBERS[key])}" if key in NUMBERS else ""


def nearest(key: str, read: Iterable[str] = ()) -> str | None:
    """Return the setting, or number that is read, whose name is nearly that of a key, if any."""
    near = difflib.get_close_matches(key.lower(), [*CHECKS, *read], n=1, cutoff=0.8)
    return near[0] if near else None
