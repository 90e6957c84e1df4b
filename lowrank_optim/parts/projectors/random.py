"""A random subspace that needs no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import generator, orthonormal_, upload
from ..kinds import COUNT, Kind
from ..types import Matrix, Site, State
from ._basis import Basis


@dataclass(frozen=True)
class Random(Basis):
    """A uniformly random orthonormal basis, a function of (seed, step of the last refresh).

    Only that step is stored. The basis is made again when needed and shared by all matrices of one
    width that were refreshed at the same step. It cannot be aligned, since it is not stored.
    """

    keys: ClassVar[tuple[str, ...]] = ("drawn",)
    kinds: ClassVar[Mapping[str, Kind]] = {"drawn": COUNT}
    learns: ClassVar[bool] = False
    captures: ClassVar[str] = ""
    on_refresh: ClassVar[tuple[str, ...]] = ("keep", "reset", "rotate")

    def basis(self, state: State, site: Site) -> Tensor:
        """Return the basis of `state["drawn"]`: the Q of a Gaussian matrix."""
        drawn = int(state["drawn"])

        def draw() -> Tensor:
            rng = generator(torch.device("cpu"), site.seed, drawn)
            shape = (site.cols, site.rank)
            gauss = torch.randn(shape, dtype=torch.float64, device="cpu", generator=rng)
            basis = upload(gauss.to(site.dtype), site.device)
            orthonormal_(basis)
            return basis

        key = ("random", site.cols, site.rank, site.dtype, site.device, site.seed, drawn)
        return site.shared.get(key, draw)

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return step 0 as the step of the draw."""
        return {"drawn": 0}

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Draw for this step."""
        for _, state, site in matrices:
            state["drawn"] = site.step
