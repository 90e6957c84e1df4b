"""How many columns a matrix is projected to: a number, a share, or chosen by the spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from ..functional.views import Shape, is_wide, matrix_shape
from .checks import SettingError, made_from
from .numbers import Number, check_numbers, with_numbers

MIN_DIM = 128
"""Default of `min_dim`, as in optax's Adafactor (`min_dim_size_to_factor`): on shorter matrices a
share of the axis saves little of a model's state, see `docs/choosing.md`."""


@lru_cache(maxsize=4096, typed=True)
def subspace_of(
    shape: Shape,
    rank: int | float | AutoRank | None,
    side: str,
    whole: bool = False,
    full: bool = False,
    min_dim: int = 1,
) -> tuple[int, int] | None:
    """Return the length of the projected axis and the rank in columns; None if not projected.

    Not projected are: a group without rank, fewer than two dimensions, no elements, a projected
    axis that is no longer than the rank, and, where the rank is a share below 1, a matrix with an
    axis shorter than `min_dim`. Where matrices are taken `whole` (`Blocks`), the rank is the share
    of them that is active, and at 1 none is projected. With `full`, a rank that drops nothing is
    projected too.
    """
    matrix = matrix_shape(shape)
    if matrix is None or rank is None:
        return None
    cols = matrix[-2] if is_wide(matrix, side) else matrix[-1]
    auto = isinstance(rank, AutoRank)
    if whole and not full and (isinstance(rank, AutoRank) or rank >= 1):
        return None
    least = rank.least if isinstance(rank, AutoRank) else rank
    share = isinstance(least, float) and least < 1
    if share and not whole and min(matrix[-2:]) < min_dim:
        return None
    width = min(width_of(rank, cols, whole), cols)
    return (cols, width) if whole or full or auto or width < cols else None


def width_of(rank: int | float | AutoRank, cols: int, whole: bool) -> int:
    """Return the rank in columns: all if matrices are taken `whole`, an `AutoRank`'s largest."""
    if whole:
        return cols
    if isinstance(rank, AutoRank):
        return rank.bounds(cols)[1]
    return max(1, round(rank * cols)) if isinstance(rank, float) else rank


@dataclass(frozen=True)
class AutoRank:
    """The smallest rank that holds a share of the gradient's energy, for each matrix its own.

    At each refresh, with P the subspace at the largest rank and e_j = |G p_j|^2 in descending
    order: the least r with e_1 + ... + e_r >= share |G|^2, between `least` and `most`. All matrices
    of a stack take the largest of their ranks.

    Args:
        share: of the energy, in (0, 1]; `rank_share` of a group.
        least, most: bounds, as shares of the projected axis in (0, 1]; never below 2 columns.
            `rank_least` and `rank_most` of a group.

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
    numbers: ClassVar[Mapping[str, Number]] = {
        "rank_share": Number.portion("share"),
        "rank_least": Number.portion("least", derived=True),
        "rank_most": Number.portion("most", derived=True),
    }

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.least > self.most:
            raise SettingError(f"least={self.least} is more than most={self.most}")

    def bounds(self, cols: int) -> tuple[int, int]:
        """Return the least and the largest rank in columns."""
        least, most = (min(cols, max(2, round(part * cols))) for part in (self.least, self.most))
        return least, most


Rank = int | float | AutoRank | None
"""A rank: columns, a share of the projected axis, chosen at each refresh, or none."""


def rank_of(setting: Rank | str) -> Rank:
    """Return the rank that the setting of a group means; an `AutoRank` may stand there as text.

    Raises:
        ValueError: any other text.
    """
    return _auto_rank(setting) if isinstance(setting, str) else setting


def rank_asked(group: Mapping[str, Any]) -> Rank:
    """Return the rank that a group asks for, with the numbers that it has for an `AutoRank`."""
    rank = rank_of(group["rank"])
    return with_numbers(rank, group) if isinstance(rank, AutoRank) else rank


@lru_cache(maxsize=256)
def _auto_rank(text: str) -> AutoRank:
    auto: AutoRank | None = AutoRank() if text == "auto" else made_from(text, [AutoRank])
    if auto is None:
        raise ValueError(f'{text!r} is neither "auto" nor the text of an AutoRank')
    return auto
