"""APOLLO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import GradScaled
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class ApolloAdamW(LowRank):
    """The whole gradient, each row scaled as AdamW would scale it in a random subspace.

    W <- (1 - lr wd) W - lr phi * G, see `GradScaled`.  Memory: 2 m r + 1 values and a step number.

    Args:
        rank: 1 gives APOLLO-Mini, one factor a matrix.
        scale: the paper's alpha, which enters by its square root. Our basis is orthonormal: at
            scale 1 the step is as long as AdamW's, at rank / n as long as the paper's.
        limiter: largest growth of |phi * G| in one step; None for no limit.
        For the other arguments and errors see `LowRank`.

    Reference: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270.
        Written from the paper's formulas.
    """

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
        projector: str | Projector = "random",
        limiter: float | None = 1.01,
        on_refresh: str = "keep",
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(common, self, rule=Adam(), residual=GradScaled(limiter)),
        )  # fmt: skip


PAPER = Paper(
    "zhu2025apollo",
    "APOLLO: SGD-like Memory, AdamW-level Performance",
    (
        "Zhu, Hanqing",
        "Zhang, Zhenyu",
        "Cong, Wenyan",
        "Liu, Xi",
        "Park, Sem",
        "Chandra, Vikas",
        "Long, Bo",
        "Pan, David Z.",
        "Wang, Zhangyang",
        "Lee, Jinwon",
    ),
    2025,
    "2412.05270",
    "Conference on Machine Learning and Systems",
)
METHOD = Method(
    "apollo",
    "APOLLO",
    ApolloAdamW,
    "2mr + 1",
    (PAPER,),
    rates=Rates(3e-3, 1e-1),
    in_planner=True,
    in_demo=True,
)
