"""RMNP."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.residuals import Drop
from ..parts.rules import RowNormalized
from ._common import with_parts
from .bibliography import ICML, Paper
from .record import Method

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class RMNPW(LowRank):
    """Momentum whose neurons are made equally long, AdamW for the rest, in one object.

    W <- (1 - lr wd) W - lr M_i / |M_i| by rows i of W,  M <- mu M + (1-mu) G, see `RowNormalized`.
    Muon's state without its products.  Memory: m n values, a byte each with `state_dtype="8bit"`.

    Args:
        lr: of matrices; give other parameters a learning rate in a group of their own
            (`param_groups(model, rank=1.0, lr=2e-2, rest_lr=1e-3)`). Not tuned here.
            The authors' code's 2e-2 is the default with the published length, 1e-3 with another.
        betas, eps: of AdamW, for parameters that are not matrices and for `length="adamw"`. torch's
            `OneCycleLR` and `CyclicLR` cycle these, and never `momentum`.
        momentum: mu.
        rank: 1.0; None in a group makes it plain AdamW.
        For the other arguments and errors see `LowRank`.

    Reference: Deng et al., "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based
        Optimization", arXiv 2603.20527.
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
        length: str = "published",
        momentum: float = 0.95,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, scale=scale, length=length,
            **with_parts(
                common, self, projector="identity", rule=RowNormalized(momentum), residual=Drop(),
            ),
        )  # fmt: skip


PAPER = Paper(
    "deng2026rmnp",
    "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based Optimization",
    (
        "Deng, Shenyang",
        "Ouyang, Zhuoli",
        "Pang, Tianyu",
        "Liu, Zihang",
        "Jin, Ruochen",
        "Yu, Shuhua",
        "Yang, Yaoqing",
    ),
    2026,
    "2603.20527",
    ICML,
)
METHOD = Method("rmnp", "RMNP", RMNPW, "mn", (PAPER,), whole=True)
