"""NorMuon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.residuals import Drop
from ..parts.rules import NorMuon
from ._common import with_parts
from .bibliography import Paper
from .muon import PAPER as MUON
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class NorMuonW(LowRank):
    """Muon whose neurons are brought to one length, AdamW for the rest, in one object.

    See `NorMuon`.  Memory: m n values, a byte each with `state_dtype="8bit"`, one a neuron, and for
    AdamW's length at most 16 kB a matrix, or 8 bytes a row beyond 2048 rows.

    Args:
        lr, weight_decay: AdamW's, for all parameters.
        length: "adamw" goes as far as AdamW would; "published" is the paper's 0.2 a weight.
        betas, eps: of AdamW, for parameters that are not matrices and for the length; the second
            beta also averages the squares of neurons. torch's `OneCycleLR` and `CyclicLR` cycle
            these, and never `momentum`.
        momentum, nesterov: see `NorMuon`; the paper's formula has no `nesterov`, the authors' code
            has it.
        rank: 1.0; None in a group makes it plain AdamW.
        For the other arguments and errors see `LowRank`.

    Reference: Li, Liu, Liang, Chen, Zhao, "NorMuon: Making Muon more efficient and scalable",
        arXiv 2510.05491; Muon: https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = 1.0,
        scale: float | None = None,
        length: str = "adamw",
        momentum: float = 0.95,
        nesterov: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, scale=scale, length=length,
            **with_parts(
                common, self, projector="identity",
                rule=NorMuon(momentum=momentum, nesterov=nesterov), residual=Drop(),
            ),
        )  # fmt: skip


PAPER = Paper(
    "li2025normuon",
    "NorMuon: Making Muon More Efficient and Scalable",
    ("Li, Zichong", "Liu, Liming", "Liang, Chen", "Chen, Weizhu", "Zhao, Tuo"),
    2025,
    "2510.05491",
)
METHOD = Method(
    "normuon",
    "NorMuon",
    NorMuonW,
    "mn + 2m + m or n",
    (MUON, PAPER),
    whole=True,
    rates=Rates(1e-2, 3e-1, (0.9, 0.95)),
)
