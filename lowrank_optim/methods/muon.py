"""Muon."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.residuals import Drop
from ..parts.rules import Muon
from ._common import split_length, with_parts
from .bibliography import Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class MuonW(LowRank):
    """Orthogonalised momentum for matrices, AdamW for the rest, in one object.

    W <- (1 - lr wd) W - lr s NS(G + mu M),  M <- mu M + G, see `Muon`.  Memory: m n values, a byte
    each with `state_dtype="8bit"`.

    Args:
        lr: of matrices; give other parameters a learning rate in a group of their own
            (`param_groups(model, rank=1.0, lr=2e-2, rest_lr=1e-3)`).
            2e-2 is the default with the published length, 1e-3 with another.
        betas, eps: of AdamW, for parameters that are not matrices and for `length="adamw"`. torch's
            `OneCycleLR` and `CyclicLR` cycle these, and never `momentum`.
        momentum, nesterov: see `Muon`.
        length: one of Muon's own, see `Orthogonal`; or "rms" or "adamw", see `LowRank`. AdamW's lr
            fits "match_rms_adamw", "rms" and "adamw".
        rank: 1.0; None in a group makes it plain AdamW.
        For the other arguments and errors see `LowRank`.

    Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon/. The shorter axis is iterated on, in bfloat16.
        `benchmarks/README.md`: with 8-bit momentum it ended 10 % below AdamW after 4000 steps.
    """

    published_lr: ClassVar[float] = 2e-2

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = 1.0,
        scale: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        length: str = "original",
        **common: Unpack[Common],
    ) -> None:
        length, own = split_length(length)
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, scale=scale, length=length,
            **with_parts(
                common, self, projector="identity",
                rule=Muon(own, momentum=momentum, nesterov=nesterov), residual=Drop(),
            ),
        )  # fmt: skip


PAPER = Paper(
    "jordan2024muon",
    "Muon: An Optimizer for Hidden Layers in Neural Networks",
    (
        "Jordan, Keller",
        "Jin, Yuchen",
        "Boza, Vlado",
        "You, Jiacheng",
        "Cesista, Franz",
        "Newhouse, Laker",
        "Bernstein, Jeremy",
    ),
    2024,
    "",
    page="https://kellerjordan.github.io/posts/muon/",
)
METHOD = Method(
    "muon",
    "Muon",
    MuonW,
    "mn",
    (PAPER,),
    whole=True,
    rates=Rates(5.5e-2, 1e-1),
    in_planner=True,
)
