"""GaLore."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import Drop
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import ICML, Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class GaLoreAdamW(LowRank):
    """AdamW on the gradient's projection onto its top singular vectors.

    W <- (1 - lr wd) W - lr scale N P^T,  N = Adam(G P).  Memory: 2 m r + n r values.

    Args:
        rank: the paper uses 128 / 256 / 256 / 512 for LLaMA 60M / 130M / 350M / 1B.
        update_proj_gap: updates between decompositions.
        scale: the paper's alpha. With the published length a projected matrix moves by lr * scale,
            other parameters by lr: give them learning rates of their own (`param_groups`).
        projector: "svd" is the paper's; "power" finds practically the same subspace without an SVD.
        on_refresh: "keep" is the paper's code; "rotate" and "align" keep the moments meaningful.
        For the other arguments and errors see `LowRank`.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507. Unlike the authors' code, eps is outside the corrected root
        and decay comes before the update, as in `torch.optim.AdamW`, and the signs of the singular
        vectors are fixed.
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
        projector: str | Projector = "svd",
        on_refresh: str = "keep",
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(common, self, rule=Adam(), residual=Drop()),
        )  # fmt: skip


PAPER = Paper(
    "zhao2024galore",
    "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    (
        "Zhao, Jiawei",
        "Zhang, Zhenyu",
        "Chen, Beidi",
        "Wang, Zhangyang",
        "Anandkumar, Anima",
        "Tian, Yuandong",
    ),
    2024,
    "2403.03507",
    ICML,
)
METHOD = Method(
    "galore",
    "GaLore",
    GaLoreAdamW,
    "2mr + nr",
    (PAPER,),
    settings={"projector": "power"},
    rates=Rates(1.7e-2, 3e-2),
    in_planner=True,
    in_demo=True,
)
