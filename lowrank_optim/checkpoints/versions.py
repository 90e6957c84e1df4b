"""Versions of the saved layout: groups of earlier versions are read as they would be saved now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..parts.checks import SettingError
from ..parts.numbers import said_by
from ..parts.types import Group
from ..settings.numbers import without_numbers
from ..settings.values import WITH_NUMBERS, class_in, part_of

STATE_VERSION = 2
"""Version of the layout of a state; a number in every group of a checkpoint.

In 1, numbers of parts stood in their texts; in 2, they are keys of the group.
"""

BEFORE = {"min_dim": 1, "length": "published"}
"""What a checkpoint of this package means that was written before there was such a setting."""


def version_of(saved: Group) -> int:
    """Return the version of a group of a checkpoint; one of another optimizer counts as new.

    Raises:
        SettingError: this package does not read it.
    """
    version = saved.get("state_version", 1 if "projector" in saved else STATE_VERSION)
    if not isinstance(version, int) or not 1 <= version <= STATE_VERSION:
        raise SettingError(
            f"the checkpoint has state_version {version}, this package reads up to "
            f"{STATE_VERSION}: upgrade lowrank-optim"
        )
    return version


def current(saved: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """Return a group of a checkpoint in the present layout.

    Args:
        saved: the group in the checkpoint.
        group: the one here, whose parts say which numbers there are.
    """
    found = dict(saved)
    if version_of(saved) == 1:
        for key in WITH_NUMBERS:
            part, text = part_of(key, group[key]), saved.get(key)
            if isinstance(text, str) and class_in(text) == type(part).__qualname__:
                found.update(said_by(text, part))
                found[key] = without_numbers(key, part)
    if "state_version" in found:
        found["state_version"] = STATE_VERSION
    return found
