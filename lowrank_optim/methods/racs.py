"""RACS."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.residuals import Drop
from ..parts.rules import RowColumnScaled
from ._common import with_parts
from .alice import PAPER as ALICE
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class RACS(LowRank):
    """The gradient with rows and columns scaled, AdamW for the rest.

    W <- (1 - lr wd) W - lr scale G_ij / sqrt(Q_i S_j), see `RowColumnScaled`.
    Memory: m + n + 1 values.

    Args:
        lr: of matrices; give other parameters a learning rate in a group of their own.
            2e-2 is the default with the published length, 1e-3 with another.
        betas, eps: of AdamW, for parameters that are not matrices and for `length="adamw"`.
        scale: the paper's alpha.
        beta: decay of Q and S.
        limiter: largest growth of the step's norm in one step; None for no limit.
        rank: 1.0; None in a group makes it plain AdamW.
        For the other arguments and errors see `LowRank`.

    Reference: Gong, Scetbon, Ma, Meeds, "Towards Efficient Optimizer Design for LLM via Structured
        Fisher Approximation with a Low-Rank Extension", arXiv 2502.07752.
    """

    published_lr: ClassVar[float] = 2e-2
    published_scale: ClassVar[float] = 0.05

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = 1.0,
        scale: float | None = None,
        length: str = "published",
        beta: float = 0.9,
        limiter: float | None = 1.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, scale=scale, length=length,
            **with_parts(
                common, self, projector="identity", rule=RowColumnScaled(beta, limiter=limiter),
                residual=Drop(),
            ),
        )  # fmt: skip


METHOD = Method(
    "racs",
    "RACS",
    RACS,
    "m + n + 1",
    (ALICE,),
    whole=True,
    rates=Rates(3e-2, 5.5e-3),
)
