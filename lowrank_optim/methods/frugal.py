"""FRUGAL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import StateFree
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import ICML, Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class FrugalAdamW(LowRank):
    """AdamW on a part of the columns or matrices, sign descent without state on the rest.

    W <- (1 - lr wd) W - lr (scale N P^T + state_free_scale sgn(G - G P P^T)).
    Memory: 2 m r values and r integers.

    Args:
        rank: the paper's density as a float, a quarter by default.
        update_proj_gap: the paper's 200 by default. Moments start anew at each refresh: shorter
            intervals cost more than they gain, see `benchmarks/README.md`.
        projector: "columns", "random", "svd", ..., or "blocks", where `rank` is the share of
            matrices that keep moments at a time.
        state_free: "sign", "sgd" or "none".
        state_free_scale: learning rate of the state-free part relative to `lr`.
        For the other arguments and errors see `LowRank`.

    Reference: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
        for Scalable Training", arXiv 2411.07837.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = 0.25,
        update_proj_gap: int = 200,
        scale: float | None = None,
        length: str = "published",
        projector: str | Projector = "columns",
        on_refresh: str = "reset",
        state_free: str = "sign",
        state_free_scale: float = 1.0,
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(
                common, self, rule=Adam(), residual=StateFree(state_free, state_free_scale),
            ),
        )  # fmt: skip


PAPER = Paper(
    "zmushko2025frugal",
    "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    ("Zmushko, Philip", "Beznosikov, Aleksandr", "Takáč, Martin", "Horváth, Samuel"),
    2025,
    "2411.07837",
    ICML,
)
METHOD = Method(
    "frugal",
    "FRUGAL",
    FrugalAdamW,
    "2mr, r integers",
    (PAPER,),
    rates=Rates(1e-3, 1e-2),
    in_planner=True,
    in_demo=True,
)
