"""Ranks that follow from the spectrum of the gradient, within bounds and a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .checks import is_real, made_from

STEPS = 1024
"""Steps of the share of all axes that a budget is turned into."""


@dataclass(frozen=True)
class AutoRank:
    """The smallest rank that holds a share of the gradient's energy, a matrix's own.

    At each refresh, with P the subspace at the largest rank and e_j = |G p_j|^2 in descending
    order: the least r with e_1 + ... + e_r >= share |G|^2, between `least` and `most`. Matrices of
    a stack have the largest of theirs in common.

    Args:
        share: of the energy, in (0, 1].
        least, most: bounds, as shares of the projected axis in (0, 1]; never below 2 columns.

    Raises:
        ValueError: a value out of its range.

    Reference: Refael et al., "AdaRankGrad: Adaptive Gradient-Rank and Moments for Memory-Efficient
        LLMs Training and Fine-Tuning", arXiv 2410.17881, whose ranks only fall; Jaiswal et al.,
        "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
        arXiv 2407.11239, for ranks that differ from layer to layer.
    """

    share: float = 0.8
    least: float = 1 / 16
    most: float = 1 / 2

    def __post_init__(self) -> None:
        for name in ("share", "least", "most"):
            value = getattr(self, name)
            if not is_real(value) or not 0 < value <= 1:
                raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
        if self.least > self.most:
            raise ValueError(f"least={self.least} is more than most={self.most}")

    def bounds(self, cols: int) -> tuple[int, int]:
        """Return the least and the largest rank in columns."""
        least, most = (min(cols, max(2, round(part * cols))) for part in (self.least, self.most))
        return least, most


Rank = int | float | AutoRank | None
"""A rank: columns, a share of the projected axis, chosen at each refresh, or none."""


def rank_of(setting: Rank | str) -> Rank:
    """Return what the setting of a group says, which is the text of an `AutoRank` for one.

    Raises:
        ValueError: a text that is none.
    """
    return _auto_rank(setting) if isinstance(setting, str) else setting


@lru_cache(maxsize=256)
def _auto_rank(text: str) -> AutoRank:
    auto: AutoRank | None = AutoRank() if text == "auto" else made_from(text, [AutoRank])
    if auto is None:
        raise ValueError(f'{text!r} is neither "auto" nor the text of an AutoRank')
    return auto


def smallest(energies: Tensor, total: Tensor, share: float) -> Tensor:
    """Return how many of the largest energies make up a share of the total, of each matrix.

    Args:
        energies: `(..., k)`, of any order.
        total: `(...)`; they may be less together.
        share: in (0, 1].

    Returns:
        `(...)` integers from 1 to k, k where all of them are too few.
    """
    sums = energies.sort(-1, descending=True).values.cumsum(-1)
    short = (sums < share * total.unsqueeze(-1)).sum(-1) + 1
    return short.clamp(max=energies.shape[-1])


def largest(energies: Tensor, count: int) -> Tensor:
    """Return the places of the largest energies `(..., count)`, in ascending order."""
    return energies.topk(count, dim=-1).indices.sort(-1).values


def within(
    bounds: Sequence[tuple[int, int]],
    cols: Sequence[int],
    bytes_at: Callable[[Sequence[int]], int],
    budget: int,
) -> list[int]:
    """Return the largest ranks of some matrices that a budget allows: one share of all axes.

    Args:
        bounds: least and largest rank of each matrix.
        cols: their projected axes.
        bytes_at: state bytes of all of them at some ranks.
        budget: bytes.

    Raises:
        ValueError: the least ranks take more.
    """

    def ranks(step: int) -> list[int]:
        shares = (step * axis // STEPS for axis in cols)
        return [min(most, max(least, r)) for (least, most), r in zip(bounds, shares, strict=True)]

    if (need := bytes_at(ranks(0))) > budget:
        raise ValueError(f"the least ranks take {need} bytes of state, the budget is {budget}")
    good, bad = 0, STEPS + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if bytes_at(ranks(middle)) <= budget else (good, middle)
    return ranks(good)


def gather_columns(basis: Tensor, places: Tensor) -> Tensor:
    """Return columns of a basis `(..., cols, k)`, or entries of a choice of columns `(..., k)`."""
    if not basis.is_floating_point():
        return basis.gather(-1, places)
    index = places.unsqueeze(-2).expand(*basis.shape[:-1], places.shape[-1])
    return basis.gather(-1, index)


def padded(state: Tensor, width: int, far: int) -> Tensor:
    """Return a basis with zero columns more, or a choice of columns with some that are nowhere.

    Args:
        state: `(..., cols, k)`, or integers `(..., k)`.
        width: columns of the result.
        far: a column that is beyond all others and beyond those of other choices.
    """
    more = width - state.shape[-1]
    if state.is_floating_point():
        return torch.nn.functional.pad(state, (0, more))
    beyond = torch.arange(far, far + more, device=state.device)
    return torch.cat([state, beyond.expand(*state.shape[:-1], -1)], -1)
