"""What single values say, and whether they may."""

from __future__ import annotations

import ast
import math
import numbers
import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B?|B)\s*", re.I)
UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "K": 2**10, "M": 2**20, "G": 2**30}
UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_in(text: str) -> int | None:
    """Return the bytes that a text such as "24GiB", "24GB" or "24G" stands for, if it is one."""
    size = SIZE.fullmatch(text)
    unit = "" if size is None else size[2].upper()
    if size is None or unit not in UNITS:
        return None
    return int(min(float(size[1]) * UNITS[unit], 2.0**63))  # an infinity is no int


def is_real(value: Any) -> bool:
    """Return whether a value is a real number that a float can hold; a boolean is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_share(name: str, value: Any, below: float = 1.0) -> None:
    """Raise ValueError unless a value is a number from 0 and below another."""
    if not is_real(value) or not 0 <= value < below:
        end = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be a number from 0{end}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")


def text_of(part: Any) -> str:
    """Return an object as `Name(settings)`, or `Name()` where its text might hold an address."""
    return repr(part) if is_dataclass(part) else f"{type(part).__name__}()"


def made_from(text: str, kinds: Iterable[type]) -> Any:
    """Return the object that `text_of` gave as text, of one of some dataclasses; None if of none.

    Raises:
        ValueError: a value that the class refuses.
        TypeError: a setting that it does not have.
    """
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
    for kind in kinds:
        if kind.__name__ == call.func.id:
            return kind(**values)
    return None


def as_text(part: Any, kinds: Iterable[type]) -> Any:
    """Return the text of an object where it says all of it, else the object itself."""
    text = text_of(part)
    return text if made_from(text, kinds) == part else part
