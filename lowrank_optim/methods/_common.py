"""Settings that every method takes, for type checkers."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from ..parts.length import LENGTHS
from ..parts.protocols import Feed


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
    """Return the group's length and Muon's own, of which a user gives one.

    Args:
        length: "published", "rms" or "adamw", with which Muon's own has no effect; or one of
            `Orthogonal`, which is how a "published" step is long.
    """
    return (length, "original") if length in LENGTHS else ("published", length)
