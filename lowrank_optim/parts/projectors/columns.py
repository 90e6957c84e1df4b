"""A random subset of the columns: no basis and no product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import generator, upload
from ..kinds import COLUMNS, Kind
from ..types import Matrix, Site, State
from ._basis import Basis, IndexTransport


@dataclass(frozen=True)
class Columns(IndexTransport, Basis):
    """A uniformly random subset of the projected axis, a function of (seed, step).

    P is a selection of unit vectors, so projecting is indexing and lifting is adding to columns.

    Reference: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
        for Scalable Training", arXiv 2411.07837.
    """

    keys: ClassVar[tuple[str, ...]] = ("index",)
    kinds: ClassVar[Mapping[str, Kind]] = {"index": COLUMNS}
    common: ClassVar[tuple[str, ...]] = ("index",)
    learns: ClassVar[bool] = False
    on_refresh: ClassVar[tuple[str, ...]] = ("keep", "reset", "rotate")

    def basis(self, state: State, site: Site) -> Tensor:
        """Return the selected unit vectors, for inspection; neither direction uses them."""
        return torch.eye(site.cols, dtype=site.dtype, device=site.device)[:, state["index"]]

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return the first `rank` columns."""
        return {"index": torch.arange(site.rank, device=site.device)}

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Draw the subset of this step, sorted."""
        for _, state, site in matrices:
            rng = generator(torch.device("cpu"), site.seed, site.step)
            drawn = torch.randperm(site.cols, device="cpu", generator=rng)[: site.rank]
            state["index"].copy_(upload(drawn.sort().values, site.device))

    def factor(self, state: State, site: Site) -> Tensor:
        """Return the columns."""
        index: Tensor = state["index"]
        return index
