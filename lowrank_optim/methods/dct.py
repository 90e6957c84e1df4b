"""DCT-AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import Drop
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class DCTAdamW(LowRank):
    """AdamW on the columns of the discrete cosine basis that carry most of the gradient.

    W <- (1 - lr wd) W - lr scale N P^T,  P = Q[:, index].  Memory: 2 m r values and r integers,
    and one n x n basis for all layers of a width.

    Args:
        update_proj_gap: 1 chooses columns anew at every update, which a fixed basis makes cheap.
        on_refresh: "rotate" copies the moments of the columns that stay and zeroes the others.
        For the other arguments and errors see `LowRank`.

    Reference: Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
        Optimization of Large Language Models", arXiv 2505.17967. Without the optional error
        feedback.
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
        update_proj_gap: int = 1,
        scale: float | None = None,
        length: str = "published",
        projector: str | Projector = "dct",
        on_refresh: str = "rotate",
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(common, self, rule=Adam(), residual=Drop()),
        )  # fmt: skip


PAPER = Paper(
    "modoranu2025fft",
    "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large "
    "Language Models",
    (
        "Modoranu, Ionut-Vlad",
        "Safaryan, Mher",
        "Schultheis, Erik",
        "Ryabinin, Max",
        "Chumachenko, Artem",
        "Alistarh, Dan",
    ),
    2025,
    "2505.17967",
)
METHOD = Method(
    "dct",
    "DCT",
    DCTAdamW,
    "2mr, r integers, one n x n basis for all layers",
    (PAPER,),
    own_gap=True,
    rates=Rates(3e-3, 1.7e-2),
    in_planner=True,
    in_demo=True,
)
