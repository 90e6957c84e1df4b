"""Settings of a group: what each may be, and the parts that names and texts stand for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

from ..parts.checks import (
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
from ..parts.feeds import FEEDS
from ..parts.length import LENGTHS
from ..parts.numbers import numbers_of
from ..parts.projectors import PROJECTORS
from ..parts.rank import AutoRank, rank_of
from ..parts.residuals import RESIDUALS
from ..parts.rules import RULES
from ..parts.rules.muon import LENGTHS as OWN_LENGTHS
from ..parts.storage import DTYPES, STORAGES

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


def length(key: str, value: Any, where: str) -> str:
    """Check length; one of Muon's own belongs to the rule."""
    if value in OWN_LENGTHS and value not in LENGTHS:
        raise SettingError(
            f"group key {key!r}{where} is {value!r}, which is a length of the rule: put it there, "
            f"as in rule=Muon(length={value!r})"
        )
    found: str = one_of(*LENGTHS)(key, value, where)
    return found


def part(registry: dict[str, Any], *methods: str) -> Callable[[str, Any, str], Any]:
    """Return a check for a name in a registry, or an object that has the named methods.

    One of ours becomes its text, so that groups hold plain data; one of the user's stays.
    """
    kinds = kinds_in(registry)
    wanted = " and ".join(f"a method `{method}`" for method in methods)

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
        elif not isinstance(value, type) and all(
            callable(getattr(value, method, None)) for method in methods
        ):
            if type(value).__hash__ is None:
                raise fail(where, key, value, "hashable, as a frozen dataclass is")
            return as_text(value, kinds)
        names = ", ".join(map(repr, registry))
        raise fail(where, key, value, f"one of {names}, or an object with {wanted}")

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
    "eps": number("a number of at least 0", lambda x: 0 <= x < math.inf),
    "weight_decay": number("a number of at least 0", lambda x: 0 <= x < math.inf),
    "rank": rank,
    "min_dim": integer(1),
    "state_budget": state_budget,
    "update_proj_gap": integer(1),
    "scale": number("a number of at least 0", lambda x: 0 <= x < math.inf),
    "length": length,
    "feed": part(FEEDS, "feed"),
    "projector": part(PROJECTORS, "refresh"),
    "rule": part(RULES, "direction"),
    "residual": part(RESIDUALS, "update", "sums", "limited"),
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
"""Settings that change only numbers of a step."""


WITH_NUMBERS = (*PARTS, "rank")
"""Settings that stand for parts with numbers."""


def readers_of_numbers() -> dict[str, list[str]]:
    """Return for each number of our parts the settings of a group that read it."""
    found: dict[str, list[str]] = {key: ['rank="auto"'] for key in AutoRank.numbers}
    for setting, registry in PARTS.items():
        for each in registry.values():
            for key in numbers_of(each):
                found.setdefault(key, []).append(f"{setting}={type(each).__name__}(...)")
    return found


NUMBERS = readers_of_numbers()
"""Keys of the numbers of our parts, and what reads them."""

DERIVED = tuple(key for key, number in AutoRank.numbers.items() if number.derived)
"""The keys among them that change more than a number of a step."""


def part_of(key: str, value: Any) -> Any:
    """Return the part that a name, a text or an object in a group stands for."""
    value = CHECKS[key](key, value, "")
    if key == "rank":
        return rank_of(value)
    registry = PARTS[key]
    if not isinstance(value, str):
        return value
    return registry[value] if value in registry else made_from(value, kinds_in(registry))


def class_in(text: str) -> str:
    """Return the class name in a text of `text_of`, which decides what the state means."""
    return text.partition("(")[0]
