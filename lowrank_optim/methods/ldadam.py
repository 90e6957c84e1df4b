"""LDAdam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..optimizer import LowRank, Params
from ..parts.feeds import GeneralErrorFeedback
from ..parts.projectors import Power
from ..parts.protocols import Projector
from ..parts.rank import AutoRank
from ..parts.residuals import Drop
from ..parts.rules import Adam
from ._common import with_parts
from .bibliography import ICLR, Paper
from .record import Method, Rates

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._common import Common


class LDAdamW(LowRank):
    """AdamW in a subspace that moves at every step, with what is lost carried along.

    See `GeneralErrorFeedback`; the subspace moves by one block power step, the moments are rotated
    with it.  Memory: 2 m r + n r values, and m n for the error, in `error_dtype`.

    Args:
        rho: share of the momentum in what the subspace is learnt from. A wrapper that puts a `rho`
            of its own into the groups, as wrappers for SAM do, sets it.
        error_dtype: how the error is stored, see `ErrorFeedback`.
        For the other arguments and errors see `LowRank`.

    Reference: Robert, Safaryan, Modoranu, Alistarh, "LDAdam: Adaptive Optimization from
        Low-Dimensional Gradient Statistics", arXiv 2410.16103. The first subspace is found by the
        power step too, from random columns, instead of an SVD.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | str | AutoRank | None = None,
        update_proj_gap: int = 1,
        scale: float | None = None,
        length: str = "published",
        projector: str | Projector = Power(1, plain=True),  # noqa: B008
        on_refresh: str = "rotate",
        rho: float = 0.908,
        error_dtype: str | None = "bfloat16",
        **common: Unpack[Common],
    ) -> None:
        feed = GeneralErrorFeedback(dtype=error_dtype, rho=rho)
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, length=length, projector=projector, on_refresh=on_refresh,
            **with_parts(common, self, rule=Adam(), residual=Drop(), feed=feed),
        )  # fmt: skip


PAPER = Paper(
    "robert2025ldadam",
    "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
    ("Robert, Thomas", "Safaryan, Mher", "Modoranu, Ionut-Vlad", "Alistarh, Dan"),
    2025,
    "2410.16103",
    ICLR,
)
METHOD = Method(
    "ldadam",
    "LDAdam",
    LDAdamW,
    "2mr + nr, mn for the error",
    (PAPER,),
    own_gap=True,
    rates=Rates(1e-2, 1e-1, (0.908, 0.99)),
)
