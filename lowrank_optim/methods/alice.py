"""Alice's compensation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import Compensated
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class CompensatedAdamW(LowRank):
    """AdamW in a learnt subspace, and the rest of the gradient with its rows brought to one length.

    W <- (1 - lr wd) W - lr scale (N P^T + compensation C), see `Compensated`.
    Memory: 2 m r + n r + m values.

    Args:
        lr: 2e-2 is the default with the published length, 1e-3 with another.
        scale: the paper's alpha.
        compensation: its alpha_c.
        limiter: largest growth of |C| in one step; None for no limit.
        For the other arguments and errors see `LowRank`.

    Reference: Gong, Scetbon, Ma, Meeds, "Towards Efficient Optimizer Design for LLM via Structured
        Fisher Approximation with a Low-Rank Extension", arXiv 2502.07752: the compensation of
        Alice, without its subspace switching and tracking.
    """

    published_lr: ClassVar[float] = 2e-2
    published_scale: ClassVar[float] = 0.3

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = None,
        update_proj_gap: int = 200,
        scale: float | None = None,
        length: str = "published",
        projector: str | Projector = "power",
        on_refresh: str = "keep",
        compensation: float = 0.4,
        limiter: float | None = 1.01,
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(
                common, self, rule=Adam(), residual=Compensated(compensation, limiter=limiter),
            ),
        )  # fmt: skip


PAPER = Paper(
    "gong2025towards",
    "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a "
    "Low-Rank Extension",
    ("Gong, Wenbo", "Scetbon, Meyer", "Ma, Chao", "Meeds, Edward"),
    2025,
    "2502.07752",
)
METHOD = Method(
    "compensated",
    "Compens.",
    CompensatedAdamW,
    "2mr + nr + m",
    (PAPER,),
    rates=Rates(1.7e-2, 3e-2, (0.9, 0.9)),
)
