"""Block coordinate descent: whole matrices take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import UNIT, Factor, generator
from ..kinds import Kind
from ..protocols import Rule
from ..types import Group, Matrix, Moments, Site, State

ORDERS = ("random", "ascending", "descending", "mirror")


@dataclass(frozen=True)
class Blocks:
    """A share of the group's matrices is active and keeps full moments; the others keep none.

    The group's `rank` is that share, a float: of N matrices `max(1, round(share N))` are active
    between two refreshes, and every matrix has its turn once a round, as long as all get their
    gradients in step: a turn goes by the matrix's own updates. With `StateFree` the others
    move by the sign of their gradient; with `Drop` they wait (block coordinate descent).

    Args:
        order: "random" (another order every round, from the seed), "ascending" (as in the group),
            "descending", or "mirror" (there and back).

    Raises:
        ValueError: an unknown order.

    Reference: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
        for Scalable Training", arXiv 2411.07837. The share counts matrices, not elements.
    """

    order: str = "random"
    keys: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[Mapping[str, Kind]] = {}
    common: ClassVar[tuple[str, ...]] = ()
    bases: ClassVar[tuple[str, ...]] = ()
    on_refresh: ClassVar[tuple[str, ...]] = ("reset",)
    learns: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    everything: ClassVar[bool] = False
    captures: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def width(self, site: Site) -> int:
        """Return all columns while the matrix is active, else 0."""
        return site.cols if self.active(site) else 0

    def active(self, site: Site) -> bool:
        """Return whether it is this matrix's turn at `site.step`."""
        size = max(1, round((site.share or 0.0) * site.turns))
        turns_a_round = -(-site.turns // size)
        lap, turn = divmod(site.step // site.gap, turns_a_round)
        place = site.turn
        if self.order == "descending" or (self.order == "mirror" and lap % 2):
            place = site.turns - 1 - place
        elif self.order == "random":
            place = shuffled(site.seed, lap, site.turns)[place]
        return place // size == turn

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return no state: whose turn it is follows from the step."""
        return {}

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Do nothing: the turn follows from the step."""

    def factor(self, state: State, site: Site) -> Factor:
        """Return `UNIT`, or no columns."""
        if self.active(site):
            return UNIT
        return torch.empty(0, dtype=torch.int64, device=site.device)

    def places(self, before: Sequence[State], states: Sequence[State]) -> Tensor | None:
        """Return None: nothing is carried."""
        return None

    def transport(
        self, rule: Rule, moments: Moments, before: State, state: State, site: Site, group: Group
    ) -> None:
        """Raise: moments of a matrix are reset at its turn; `Plan` refuses the setting."""
        raise ValueError("moments of blocks cannot be carried over")

    def align(self, before: State, state: State) -> None:
        """Raise: there is no basis; `Plan` refuses the setting."""
        raise ValueError("blocks have no basis to align")


@lru_cache(maxsize=64)
def shuffled(seed: int, lap: int, turns: int) -> tuple[int, ...]:
    """Return the order of one round, a function of its arguments alone."""
    rng = generator(torch.device("cpu"), seed, lap)
    return tuple(torch.randperm(turns, device="cpu", generator=rng).tolist())
