"""Lengths: how long the update of a matrix is, whatever its direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .kinds import NOT_NEGATIVE, Kind
from .types import Group, Site, State

SAMPLE = "sample"
ENTRIES = 1024
"""Entries of a sample: as many a row as make up this number, and one a row at least."""

RMS = 0.2
"""Root mean square of AdamW's update in the long run, in units of lr; see `Measured`."""


@dataclass(frozen=True)
class Published:
    """The length that the rule and the residual give the update, times `scale` as they say."""

    measured: ClassVar[bool] = False
    sampled: ClassVar[bool] = False
    keys: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[Mapping[str, Kind]] = {}

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return no state."""
        return {}

    def inside(self, group: Group) -> Group:
        """Return the settings that the residual reads: the group's own."""
        return group

    def factor(self, scale: float, norm: Tensor, sampled: Tensor | None, site: Site) -> Tensor:
        """Return the factor of an update of some norm: 1."""
        return torch.ones_like(norm)


@dataclass(frozen=True)
class Measured(Published):
    """A fixed length: W moves by lr s U with s = scale 0.2 sqrt(m n) / |U|_F, in every step.

    The update of AdamW has a root mean square of about sqrt((1-b1) / (1+b1)) where gradients are
    noise, 0.23 at b1 = 0.9; it is larger while they agree. An update of norm 0 stays 0, and of one
    whose norm is not finite all finite entries become 0.

    Reference: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, has 0.2 for Muon,
        from the shape of the matrix; Li et al., "NorMuon", arXiv 2510.05491, from |U|_F, as here.
    """

    measured: ClassVar[bool] = True

    def inside(self, group: Group) -> Group:
        """Return the group's settings with a scale of 1: the scale is of the whole update."""
        return {**group, "scale": 1.0}

    def factor(self, scale: float, norm: Tensor, sampled: Tensor | None, site: Site) -> Tensor:
        """Return s.

        Args:
            scale: of the group.
            norm: |U|_F of each matrix.
            sampled: sum of squares of Adam's directions on each sample, where there is one.
            site: of the matrices.
        """
        size = scale * math.sqrt(site.layout.rows * site.layout.cols)
        wanted = self.rms(sampled, site) * size
        return torch.where((norm > 0) & (norm < math.inf), wanted / norm, 0.0)

    def rms(self, sampled: Tensor | None, site: Site) -> Tensor | float:
        """Return the root mean square of an update at a scale of 1."""
        return RMS


@dataclass(frozen=True)
class Sampled(Measured):
    """The length of AdamW's own step, measured on a sample of the entries of each matrix.

    a = Adam(g) on the entries g of the sample, with the group's betas and eps;
    s = scale RMS(a) sqrt(m n) / |U|_F, so that W moves by lr s U: as far as AdamW would move it.

    There are `ENTRIES` entries, spread evenly over the rows, one a row at least: in a matrix of
    which some rows get no gradient the sample has its share of these, as AdamW's step has. Each
    matrix of a stack has its own. Their moments are 8 bytes an entry, in the dtype of the
    arithmetic.

    Reference: the length of one optimizer for the direction of another: Agarwal et al.,
        "Disentangling Adaptive Gradient Methods from Learning Rates" (grafting), arXiv 2002.11803.
        Measuring it on a sample is ours.
    """

    sampled: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = (f"{SAMPLE}.exp_avg", f"{SAMPLE}.exp_avg_sq")
    kinds: ClassVar[Mapping[str, Kind]] = {f"{SAMPLE}.exp_avg_sq": NOT_NEGATIVE}

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return both moments of the entries in the rows that are held, `(*batch, rows, width)`."""
        shape = (*batch, rows, width_of(site))
        return {key: torch.zeros(shape, dtype=site.dtype, device=site.device) for key in self.keys}

    def rms(self, sampled: Tensor | None, site: Site) -> Tensor | float:
        """Return RMS(a)."""
        assert sampled is not None
        return (sampled / (site.layout.rows * width_of(site))).sqrt()


def width_of(site: Site) -> int:
    """Return the entries of a sample in each row of a matrix."""
    return min(site.layout.cols, -(-ENTRIES // max(1, site.layout.rows)))


def first_entry(site: Site) -> int:
    """Return the number of the first entry that this process holds, see `sample_columns`.

    Seed and shape alone decide which entries there are: a parameter may change its place among the
    groups, and a checkpoint may have another order.
    """
    layout = site.layout
    first_row = layout.first_row % max(1, layout.rows)
    start = site.seed * 0x9E3779B1 % (1 << 32)
    return start + first_row * width_of(site)


LENGTHS: dict[str, Published] = {
    "published": Published(),
    "rms": Measured(),
    "adamw": Sampled(),
}
