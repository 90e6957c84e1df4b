"""Fira."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import NormScaled
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class FiraAdamW(LowRank):
    """GaLore plus the rest of the gradient, scaled row by row as Adam scaled the projection.

    W <- (1 - lr wd) W - lr (scale N P^T + S), see `NormScaled`.  Memory: 2 m r + n r + 1 values.

    Args:
        scale: the paper's alpha.
        limiter: largest growth of |S| in one step; None for no limit.
        For the other arguments and errors see `LowRank`; the paper's form of S is
        `LowRank(residual=NormScaled(form="paper"))` or a group's "residual".

    Reference: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
        Constraint?", arXiv 2410.01623, in the form of the authors' code.
    """

    published_scale: ClassVar[float] = 0.25

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = None,
        update_proj_gap: int = 200,
        scale: float | None = None,
        length: str = "published",
        limiter: float | None = 1.01,
        projector: str | Projector = "svd",
        on_refresh: str = "keep",
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(common, self, rule=Adam(), residual=NormScaled(limiter)),
        )  # fmt: skip


PAPER = Paper(
    "chen2025fira",
    "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    (
        "Chen, Xi",
        "Feng, Kaituo",
        "Li, Changsheng",
        "Lai, Xunhao",
        "Yue, Xiangyu",
        "Yuan, Ye",
        "Wang, Guoren",
    ),
    2025,
    "2410.01623",
    "Advances in Neural Information Processing Systems",
)
METHOD = Method(
    "fira",
    "Fira",
    FiraAdamW,
    "2mr + nr + 1",
    (PAPER,),
    settings={"projector": "power"},
    rates=Rates(5.5e-3, 1e-1),
    in_planner=True,
    in_demo=True,
)
