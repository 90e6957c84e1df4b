"""Checks of single values."""

from __future__ import annotations

import math
import numbers
from typing import Any


def is_real(value: Any) -> bool:
    """Return whether a value is a real number; a boolean is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_share(name: str, value: Any, below: float = 1.0) -> None:
    """Raise ValueError unless a value is a number from 0 and below another."""
    if not is_real(value) or not 0 <= value < below:
        end = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be a number from 0{end}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
