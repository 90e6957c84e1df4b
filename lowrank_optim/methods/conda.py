"""Conda."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.feeds import WholeMomentum
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import Drop
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class CondaW(LowRank):
    """Adam whose second moment lives in the singular basis of the first.

    M <- b1 M + (1-b1) G,  P from the right singular vectors of M, V <- b2 V + (1-b2) (G P)^2,
    W <- (1 - lr wd) W - lr scale (M P / (sqrt(V) + eps)) P^T, moments without their bias.
    Memory: 2 m n + n^2 values at full rank: more than AdamW. It is here for its quality; a lower
    rank, or `state_dtype="8bit"`, saves.

    Args:
        lr: 1e-2 is the default with the published length, 1e-3 with another.
        rank: 1.0 in the paper.
        update_proj_gap: updates between decompositions.
        scale: the paper's alpha.
        projector: "svd" is the paper's; "power" finds a subspace of lower rank without an SVD.
        For the other arguments and errors see `LowRank`.

    Reference: Wang et al., "Conda: Column-Normalized Adam for Training Large Language Models
        Faster", arXiv 2509.24218. Unlike the authors' code, eps is outside the corrected root and
        decay comes before the update, as in `torch.optim.AdamW`.
    """

    published_lr: ClassVar[float] = 1e-2
    published_scale: ClassVar[float] = 0.25

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = 1.0,
        update_proj_gap: int = 2000,
        scale: float | None = None,
        length: str = "published",
        projector: str | Projector = "svd",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector,
            **with_parts(common, self, rule=Adam(), residual=Drop(), feed=WholeMomentum()),
        )  # fmt: skip


PAPER = Paper(
    "wang2025conda",
    "Conda: Column-Normalized Adam for Training Large Language Models Faster",
    (
        "Wang, Junjie",
        "Zhou, Pan",
        "Dong, Yiming",
        "Li, Huan",
        "Li, Jia",
        "Zhou, Xun",
        "Lao, Qicheng",
        "Fang, Cong",
        "Lin, Zhouchen",
    ),
    2025,
    "2509.24218",
)
METHOD = Method(
    "conda",
    "Conda",
    CondaW,
    "2mn + n²",
    (PAPER,),
    whole=True,
    rates=Rates(1e-2, 1e-1, (0.9, 0.99)),
)
