"""Settings that every method takes, for type checkers, and parts that one fixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from ..parts.checks import SettingError, fail
from ..parts.length import LENGTHS
from ..parts.protocols import Feed
from ..parts.rules.muon import LENGTHS as OWN_LENGTHS


class Common(TypedDict, total=False):
    """Settings whose default is the same in every method; see `LowRank`."""

    min_dim: int
    side: str
    state_budget: int | str | None
    state_dtype: torch.dtype | str | None
    stochastic_rounding: bool
    skip_nonfinite: bool
    maximize: bool
    capturable: bool
    seed: int
    impl: str
    stagger: bool
    shard_basis: bool
    foreach: bool | None
    fused: bool | None
    amsgrad: bool
    differentiable: bool
    process_group: Any


class WithFeed(Common, total=False):
    """The same for methods whose feed can be chosen."""

    feed: str | Feed


def split_length(length: str) -> tuple[str, str]:
    """Return the group's length and Muon's own length, of which the user gives one.

    Args:
        length: "published", "rms" or "adamw", with which Muon's own has no effect; or one of
            `Orthogonal`, which gives the length of a "published" step.

    Raises:
        SettingError: it is neither.
    """
    if length not in (*LENGTHS, *OWN_LENGTHS):
        raise fail("", "length", length, f"one of {', '.join(map(repr, (*LENGTHS, *OWN_LENGTHS)))}")
    return (length, "original") if length in LENGTHS else ("published", length)


def with_parts(common: Mapping[str, Any], optimizer: object, **parts: Any) -> dict[str, Any]:
    """Return the settings that a method passes on, and the parts that make it what it is.

    Args:
        common: settings that were given to its constructor.
        optimizer: whose class a message names.
        **parts: what the method fixes.

    Raises:
        SettingError: one of these parts was given too.
    """
    for key in parts:
        if key in common:
            raise SettingError(
                f"{key}={common[key]!r}: {type(optimizer).__name__} is the method with "
                f"{key}={parts[key]!r}. Leave it out, or take LowRank, which takes any {key}"
            )
    return {**common, **parts}
