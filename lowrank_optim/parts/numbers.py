"""Numbers of parts: declared by the part that reads them, and kept in the group beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .checks import SettingError, fail, is_count, is_real, read_text, text_of

Part = TypeVar("Part")


@dataclass(frozen=True)
class Number:
    """A number that a part reads from its group, under its key in the part's `numbers`.

    Attributes:
        field: the part's field whose value is the group's default.
        wanted: what it may be, in words.
        good: tells whether a value is that.
        kind: its type in a group, unless it is None.
        also: other keys of a group with the same meaning.
        derived: whether sites depend on it, so that a change takes more than a new number.
    """

    field: str
    wanted: str
    good: Callable[[Any], bool]
    kind: type = float
    also: tuple[str, ...] = ()
    derived: bool = False

    def check(self, key: str, value: Any, where: str) -> Any:
        """Return a value in its normal form; raise SettingError if it is not `good`."""
        if not self.good(value):
            raise fail(where, key, value, self.wanted)
        return None if value is None else self.kind(value)

    @classmethod
    def decay(cls, field: str, also: tuple[str, ...] = ()) -> Number:
        """Return the declaration of an average's decay, in [0, 1)."""
        wanted = "a number from 0 and below 1"
        return cls(field, wanted, lambda x: is_real(x) and 0 <= x < 1, also=also)

    @classmethod
    def share(cls, field: str) -> Number:
        """Return the declaration of a share, in [0, 1]."""
        return cls(field, "a number in [0, 1]", lambda x: is_real(x) and 0 <= x <= 1)

    @classmethod
    def portion(cls, field: str, derived: bool = False) -> Number:
        """Return the declaration of a share above 0, in (0, 1]."""
        wanted = "a number in (0, 1]"
        return cls(field, wanted, lambda x: is_real(x) and 0 < x <= 1, derived=derived)

    @classmethod
    def factor(cls, field: str, also: tuple[str, ...] = ()) -> Number:
        """Return the declaration of a finite factor of at least 0."""
        return cls(field, "a number from 0", lambda x: is_real(x) and 0 <= x < math.inf, also=also)

    @classmethod
    def growth(cls, field: str) -> Number:
        """Return the declaration of a largest growth a step, None for no limit."""
        wanted = "None or a number of at least 1"
        return cls(field, wanted, lambda x: x is None or (is_real(x) and x >= 1))

    @classmethod
    def count(cls, field: str) -> Number:
        """Return the declaration of a count of at least 1."""
        return cls(field, "an int of at least 1", is_count, int)

    @classmethod
    def choice(cls, field: str) -> Number:
        """Return the declaration of a boolean."""
        return cls(field, "True or False", lambda x: isinstance(x, bool), bool)


def numbers_of(part: Any) -> Mapping[str, Number]:
    """Return the numbers that a part declares, by key; a user's own part may declare none."""
    found: Mapping[str, Number] = getattr(part, "numbers", {})
    return found


def check_numbers(part: Any) -> None:
    """Raise SettingError if a field of a part is not what its declaration wants."""
    for key, number in numbers_of(part).items():
        value = getattr(part, number.field)
        if not number.good(value):
            name = key if key == number.field else f"{key}: {number.field}"
            raise SettingError(f"{name} must be {number.wanted}, got {value!r}")


def bare_text(part: Any) -> str:
    """Return a part as text without its numbers."""
    return text_of(part, {number.field for number in numbers_of(part).values()})


def said_by(setting: Any, part: Any) -> dict[str, Any]:
    """Return the numbers that a setting itself gives, by key.

    Args:
        setting: a name, which gives no numbers; a text, which gives the numbers in it; or an
            object, which gives all.
        part: what the setting stands for.
    """
    numbers = numbers_of(part)
    if not isinstance(setting, str):
        return {key: getattr(part, number.field) for key, number in numbers.items()}
    _, words = read_text(setting) or ("", {})
    return {key: words[n.field] for key, n in numbers.items() if n.field in words}


def with_numbers(part: Part, group: Mapping[str, Any]) -> Part:
    """Return a part with the numbers that a group has for it."""
    numbers = numbers_of(part).items()
    values = {number.field: group[key] for key, number in numbers if key in group}
    return replace(part, **values) if values else part  # type: ignore[type-var]
