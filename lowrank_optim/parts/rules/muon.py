"""Muon and NorMuon: momentum whose singular values are made equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...functional import newton_schulz
from ...sharding.whole_matrices import of_whole_matrices
from ..kinds import NOT_NEGATIVE, Kind
from ..numbers import Number, check_numbers
from ..types import Group, Job, Moments, Site, State
from ._matrix import OfMatrices, zeros

LENGTHS = ("original", "match_rms_adamw", "dion", "none")
EPS = 1e-8


@dataclass(frozen=True)
class Orthogonal(OfMatrices):
    """The orthogonal factor of what is projected: N = s NS(R), see `functional.newton_schulz`.

    For feeds that carry a momentum; `Muon` has its own. s depends on the weight's shape, (out, in):

    ========================  =================================================
    `length`
    ========================  =================================================
    "original"                sqrt(max(1, out / in)), Muon's first form
    "match_rms_adamw"         0.2 sqrt(max(out, in)): steps as long as AdamW's
    "dion"                    sqrt(out / in)
    "none"                    1
    ========================  =================================================

    Args:
        length: which s.
        iterations: of Newton-Schulz, at least 1.

    Raises:
        ValueError: an unknown length, or iterations below 1.

    Reference: as `Muon`; for lengths also Liu et al., "Muon is Scalable for LLM Training", arXiv
        2502.16982, and Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295.
    """

    length: str = "original"
    iterations: int = 5
    numbers: ClassVar[Mapping[str, Number]] = {"iterations": Number.count("iterations")}

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise ValueError(f"length must be one of {', '.join(LENGTHS)}, got {self.length!r}")
        check_numbers(self)

    def complete(
        self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group
    ) -> list[Tensor]:
        """Return the orthogonal factors, each found by one of the processes that share it."""
        factors = self.orthogonal(directions, jobs, group)
        size = self.size(jobs[0])
        return [factor.mul_(size) for factor in factors.unbind()]

    def orthogonal(self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group) -> Tensor:
        """Return NS(R) of all matrices, `(len(jobs), ..., rows, rank)`."""
        dtype = directions[0].dtype
        products = torch.bfloat16 if dtype == torch.float32 else dtype
        function = partial(newton_schulz, iterations=group["iterations"], dtype=products)
        return of_whole_matrices(function, torch.stack(list(directions)), jobs[0].layout)

    def size(self, job: Job) -> float:
        """Return s."""
        layout = job.layout
        outputs, inputs = layout.rows, layout.cols
        if layout.wide:
            outputs, inputs = inputs, outputs
        if self.length == "original":
            return math.sqrt(max(1, outputs / inputs))
        if self.length == "match_rms_adamw":
            return 0.2 * math.sqrt(max(outputs, inputs))
        return math.sqrt(outputs / inputs) if self.length == "dion" else 1.0


@dataclass(frozen=True)
class Muon(Orthogonal):
    """Momentum, orthogonalised.

    M <- mu M + R,  N = s NS(R + mu M) with `nesterov`, else s NS(M)

    Args:
        length, iterations: see `Orthogonal`.
        momentum: mu, in [0, 1).
        nesterov: look ahead by one gradient.

    Raises:
        ValueError: as `Orthogonal`, or a momentum outside of [0, 1).

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/. Parameters that are not matrices get AdamW, as
        there. In a learnt subspace with `on_refresh="rotate"` it is nearly SUMO, arXiv 2505.24749.
    """

    momentum: float = 0.95
    nesterov: bool = True
    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)
    numbers: ClassVar[Mapping[str, Number]] = {
        **Orthogonal.numbers,
        "momentum": Number.decay("momentum"),
        "nesterov": Number.choice("nesterov"),
    }

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moment in place and return what is to be orthogonalised."""
        momentum: float = group["momentum"]
        moment = moments["exp_avg"].mul_(momentum).add_(grad)
        return torch.add(grad, moment, alpha=momentum) if group["nesterov"] else moment


@dataclass(frozen=True)
class NorMuon(Muon):
    """Muon whose neurons are brought to one length, by the average of their squares.

    M <- mu M + (1-mu) R,  O = NS(M),  v <- b2 v + (1-b2) mean(O*O) over each neuron's inputs,
    O' = O / (sqrt(v) + 1e-8),  N = 0.2 sqrt(out in) O' / |O'|_F

    b2 is the second of the group's `betas`. A neuron is a row of the weight, wherever the projected
    axis lies; N is as long as an AdamW step.

    Args:
        momentum, nesterov, iterations: see `Muon`; `length` has no effect.

    Reference: Li, Liu, Liang, Chen, Zhao, "NorMuon: Making Muon more efficient and scalable",
        arXiv 2510.05491. With `nesterov` as in the authors' code; the paper's formula has none.
    """

    nesterov: bool = False
    unprojected: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ("column_sq",)
    row_keys: ClassVar[tuple[str, ...]] = ("row_sq",)
    kinds: ClassVar[Mapping[str, Kind]] = {"column_sq": NOT_NEGATIVE, "row_sq": NOT_NEGATIVE}

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return v, a value for each row that is held or, where columns are outputs, each column.

        The other entry is empty.
        """
        by_column = int(site.layout.wide)
        return {
            "row_sq": zeros((*batch, rows, 1 - by_column), site),
            "column_sq": zeros((*batch, by_column, site.cols), site),
        }

    def complete(
        self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group
    ) -> list[Tensor]:
        """Return N of each matrix; v of each job in place."""
        factors = self.orthogonal(directions, jobs, group)
        layout, decay = jobs[0].layout, group["betas"][1]
        axis = -2 if layout.wide else -1
        squares = factors.square()
        energy = squares.sum(axis, keepdim=True)
        if layout.wide:
            energy = layout.team.sum_(energy)
        key = "column_sq" if layout.wide else "row_sq"
        held = [job.state[key] for job in jobs]
        count = layout.rows if layout.wide else layout.cols
        average = torch.stack(held).mul_(decay).add_(energy, alpha=(1 - decay) / count)
        for part, value in zip(held, average.unbind(), strict=True):
            part.copy_(value)
        root = average.sqrt_().add_(EPS)
        length = (energy / root.square()).sum((-2, -1), keepdim=True)
        if not layout.wide:
            length = layout.team.sum_(length)
        size = 0.2 * math.sqrt(layout.rows * layout.cols)
        scale = size / (length.sqrt_() + EPS)
        return list((factors / root).mul_(scale).unbind())
