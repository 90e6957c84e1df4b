"""Checks of single values, and parts as text."""

from __future__ import annotations

import ast
import math
import numbers
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B?|B)\s*", re.I)
UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "K": 2**10, "M": 2**20, "G": 2**30}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_in(text: str) -> int | None:
    """Return the bytes that a text such as "24GiB", "24GB" or "24G" stands for; None for others."""
    size = SIZE.fullmatch(text)
    unit = "" if size is None else size[2].upper()
    if size is None or unit not in UNITS:
        return None
    return int(min(float(size[1]) * UNITS[unit], 2.0**63))  # an infinity is no int


def is_real(value: Any) -> bool:
    """Return whether a value is a real number that a float can hold, and not a boolean."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_count(value: Any) -> bool:
    """Return whether a value is an int of at least 1."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def text_of(part: Any, without: Container[str] = ()) -> str:
    """Return an object as `Name(settings)`, or `Name()` where its text might hold an address.

    Args:
        part: the object.
        without: settings that are left out.
    """
    if not is_dataclass(part):
        return f"{type(part).__name__}()"
    if not without:
        return repr(part)
    shown = (field.name for field in fields(part) if field.repr and field.name not in without)
    words = ", ".join(f"{name}={getattr(part, name)!r}" for name in shown)
    return f"{type(part).__qualname__}({words})"


def read_text(text: str) -> tuple[str, dict[str, Any]] | None:
    """Return the name and the settings in a text of `text_of`; None for any other text."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        return None
    values = {}
    for word in call.keywords:
        endless = isinstance(word.value, ast.Name) and word.value.id == "inf"
        try:
            values[str(word.arg)] = math.inf if endless else ast.literal_eval(word.value)
        except ValueError:
            return None
    return call.func.id, values


def made_from(text: str, kinds: Iterable[type]) -> Any:
    """Return the object, of some dataclasses, whose `text_of` is the text; None if none has it.

    Raises:
        ValueError: a value that the class refuses.
        TypeError: a setting that it does not have.
    """
    if (found := read_text(text)) is not None:
        name, values = found
        for kind in kinds:
            if kind.__name__ == name:
                return kind(**values)
    return None


def as_text(part: Any, kinds: Iterable[type]) -> Any:
    """Return the text of an object, if the object can be made from it again; else the object."""
    text = text_of(part)
    return text if made_from(text, kinds) == part else part


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
    check = number("a finite number, or a tensor of one", math.isfinite)
    if not isinstance(value, Tensor):
        return check(key, value, where)
    if value.numel() != 1:
        raise fail(where, key, value, "a finite number, or a tensor of one")
    if value.device.type == "cpu":
        check(key, value.item(), where)
    return value


def betas(key: str, value: Any, where: str) -> tuple[float, float]:
    """Check betas: two numbers in [0, 1)."""
    try:
        first, second = (float(beta) for beta in value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        raise fail(where, key, value, "two numbers in [0, 1)") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise fail(where, key, value, "two numbers in [0, 1)")
    return first, second


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
