"""Numbers of parts in a group: where each comes from."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from ..parts.checks import (
    SettingError,
)
from ..parts.numbers import bare_text, numbers_of, said_by
from ..parts.types import Group
from .keys import (
    check_keys,
    translate,
)
from .values import CHECKS, NUMBERS, PARTS, WITH_NUMBERS, part_of


def reading(group: Group) -> list[tuple[str, Any, Any]]:
    """Return (setting, its value, part) of all parts whose numbers the steps of a group read.

    Where nothing is projected, this is only the rule of plain parameters.
    """
    rule = part_of("rule", group["rule"])
    plain = [("rule", "", rule.plain)] if rule.plain is not rule else []
    if group["rank"] is None:
        return plain or [("rule", group["rule"], rule)]
    return [*((key, group[key], part_of(key, group[key])) for key in WITH_NUMBERS), *plain]


def default_of(key: str, value: Any) -> Any:
    """Return what a group gets for a setting of the constructor: parts without their numbers.

    `placed` adds the numbers, unless the group has its own.
    """
    if key not in WITH_NUMBERS or not isinstance(value, str) or value in names_of(key):
        return value
    return without_numbers(key, part_of(key, value))


def fill(group: dict[str, Any], defaults: Group, scale_of: Callable[[str], float]) -> None:
    """Give a group a default for each setting that it lacks, in place.

    Args:
        group: its scale may be None, which is one that it lacks.
        defaults: the constructor's settings.
        scale_of: the method's scale for a length: of a group that has another than the constructor.
    """
    if group.get("scale", 0.0) is None:
        del group["scale"]
    if "scale" not in group and group.get("length", defaults["length"]) != defaults["length"]:
        group["scale"] = scale_of(group["length"])
    for key, value in defaults.items():
        if key not in group:
            group[key] = default_of(key, value)


def names_of(key: str) -> Container[str]:
    """Return the names that a setting may have in place of a part."""
    return PARTS.get(key, ("auto",))


def without_numbers(key: str, part: Any) -> str:
    """Return the text of one of our parts without its numbers."""
    return "auto" if key == "rank" else bare_text(part)


def placed(
    group: Group, where: str, defaults: Group, before: Sequence[Group] = ()
) -> dict[str, Any]:
    """Return a group with the keys of ours, and the numbers of its parts beside them.

    A part of ours stands in a group as text without numbers, a user's own part as it is. Each
    number comes from the first of these that has it: its own key; the part here, an object or a
    text with numbers; the constructor's part, if it is of the same kind; the default of the class.

    Args:
        group: complete except for numbers.
        where: names it in a message.
        defaults: the constructor's settings.
        before: what this group, or the groups that it may come from, had at the last look. A number
            that is there unchanged has not been asked for: it gives way to a new part's number, and
            goes with a part that is gone.

    Raises:
        SettingError: a number with two different values, or one that nothing in the group reads.
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
