"""Our own method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import StateFree
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import HALKO
from .frugal import PAPER as FRUGAL
from .galore import PAPER as GALORE
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import WithFeed


class LowRankAdamW(LowRank):
    """Our own: AdamW in a subspace that follows the gradient, small sign steps in the rest.

    W <- (1 - lr wd) W - lr (N P^T + state_free_scale sgn(G - G P P^T)),  N = Adam(G P), with P the
    top singular directions by power iteration, refreshed often, and moments that are kept as they
    are at a refresh.  Memory: 2 m r + n r + 2 m values.

    Args:
        lr, weight_decay: AdamW's, for all parameters.
        length: "adamw" goes as far as AdamW would; with "published", which is Adam's length inside
            the subspace, the best lr is two to five times AdamW's.
        rank: a share of the projected axis, a quarter by default.
        update_proj_gap: updates between refreshes.
        state_free_scale: length of the sign step relative to `lr`.
        For the other arguments and errors see `LowRank`.

    Reference: none; the parts are GaLore's subspace (Zhao et al., arXiv 2403.03507), found by block
        power iteration, and the state-free step of FRUGAL (Zmushko et al., arXiv 2411.07837), where
        it is as long as Adam's. `benchmarks/README.md` has the evidence: ahead of AdamW in runs of
        up to 1600 steps, level with it after 4000.
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
        update_proj_gap: int = 50,
        scale: float | None = None,
        length: str = "adamw",
        projector: str | Projector = "power",
        on_refresh: str = "keep",
        state_free: str = "sign",
        state_free_scale: float = 0.5,
        **common: Unpack[WithFeed],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(
                common, self, rule=Adam(), residual=StateFree(state_free, state_free_scale),
            ),
        )  # fmt: skip


METHOD = Method(
    "lowrank",
    "LowRank",
    LowRankAdamW,
    "2mr + nr + 2m",
    (GALORE, FRUGAL, HALKO),
    own_gap=True,
    rates=Rates(3e-3, 5.5e-2),
    in_planner=True,
)
