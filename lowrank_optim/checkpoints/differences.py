"""The settings in which a checkpoint and an optimizer differ, in words for a warning."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..parts.types import Group
from ..settings.plans import described, numbers_in
from ..settings.values import CHECKS

COUNTS = ("skipped_steps",)
"""Settings that count steps: a checkpoint has counted more of them."""

SCHEDULED = ("lr", "weight_decay", "betas")
"""What schedules change, beside numbers of parts; they leave "initial_lr" in the group."""


def news(groups: Sequence[Group], saved: Sequence[Group], live: Sequence[str]) -> str:
    """Return which settings differ from what the user has asked for, as a sentence; "" for none.

    Args:
        groups: as the optimizer was built.
        saved: the groups of the checkpoint, one for each.
        live: the settings that stay as they are here.
    """
    pairs = list(zip(groups, saved, strict=True))
    theirs = dict.fromkeys(text for pair in pairs for text in from_checkpoint(*pair, live))
    ours = dict.fromkeys(text for pair in pairs for text in as_asked(*pair))
    parts = [f"from the checkpoint {', '.join(theirs)}"] * bool(theirs)
    parts += [f"as asked here {', '.join(ours)}"] * bool(ours)
    return f"settings here and in the checkpoint differ: {'; '.join(parts)}" if parts else ""


def from_checkpoint(own: Group, saved: Group, live: Sequence[str]) -> Iterator[str]:
    """Yield the settings that the checkpoint changes here."""
    numbers = numbers_in(own)
    known = "initial_lr" in own or "initial_lr" in saved
    scheduled = (*SCHEDULED, *numbers) if known else ()
    for key in (*CHECKS, *numbers):
        if key in saved and key in own and key not in (*live, *COUNTS, *scheduled):
            here, there = plain(own[key]), plain(saved[key])
            if here != there:
                yield f"{key} {there} (here {here})"


def as_asked(own: Group, saved: Group) -> Iterator[str]:
    """Yield the settings that stay as asked here, and differ from the checkpoint."""
    if "state_dtype" in saved and saved["state_dtype"] != own["state_dtype"]:
        yield f"state_dtype {own['state_dtype']} (in the checkpoint {saved['state_dtype']})"
    for key, text in described(own).items():
        there = str(saved.get(key, text))
        if there != text and differ(text, there):
            yield f"{key} {text} (in the checkpoint {there})"


def differ(here: str, there: str) -> bool:
    """Return whether two texts of one kind of part have different values for a setting of both."""
    found = []
    for text in (here, there):
        try:
            call = ast.parse(text, mode="eval").body
        except SyntaxError:
            return True
        keywords = call.keywords if isinstance(call, ast.Call) else []
        found.append({word.arg: ast.unparse(word.value) for word in keywords})
    return any(found[0][key] != found[1][key] for key in found[0].keys() & found[1].keys())


def plain(value: Any) -> Any:
    """Return a setting as a number where it is a tensor of one."""
    return value.item() if isinstance(value, Tensor) else value
