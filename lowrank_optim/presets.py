"""Our own method and the published ones as settings of one engine; no logic.

Each takes the settings of `LowRank` that all methods share as keywords too: rank, side, seed,
state_dtype, stochastic_rounding, skip_nonfinite, maximize, capturable, impl, stagger,
shard_basis, process_group. Memory is given for a matrix of m rows and n columns, m >= n, at rank r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .optimizer import LowRank, Params
from .plan import Projector
from .residuals import Drop, GradScaled, NormScaled, StateFree
from .rules import Adam

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Common(TypedDict, total=False):
    """Settings whose default is the same in every method; see `LowRank`."""

    side: str
    state_dtype: torch.dtype | str | None
    stochastic_rounding: bool
    skip_nonfinite: bool
    maximize: bool
    capturable: bool
    seed: int
    impl: str
    stagger: bool
    shard_basis: bool
    process_group: Any


class LowRankAdamW(LowRank):
    """Our own: AdamW in a subspace that follows the gradient, small sign steps in the rest.

    W <- (1 - lr wd) W - lr (N P^T + state_free_scale sgn(G - G P P^T)),  N = Adam(G P), with P the
    top singular directions by power iteration, turned on often, and moments that are kept as they
    are meanwhile.  Memory: 2 m r + n r values.

    Args:
        lr: larger than AdamW's best rate for the same matrices: five times in short runs, twice in
            longer ones.
        rank: a share of the projected axis, a quarter by default.
        update_proj_gap: updates between refreshes.
        state_free_scale: length of the sign step relative to `lr`.
        For the other arguments and errors see `LowRank`.

    Reference: none; the parts are GaLore's subspace (Zhao et al., arXiv 2403.03507), found by block
        power iteration, and the state-free step of FRUGAL (Zmushko et al., arXiv 2411.07837), where
        it is as long as Adam's. `benchmarks/README.md` has the evidence.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = 0.25,
        update_proj_gap: int = 50,
        scale: float = 1.0,
        projector: str | Projector = "power",
        on_refresh: str = "keep",
        state_free: str = "sign",
        state_free_scale: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, projector=projector, on_refresh=on_refresh, rule=Adam(),
            residual=StateFree(state_free, state_free_scale), **common,
        )  # fmt: skip


class GaLoreAdamW(LowRank):
    """AdamW on the gradient's projection onto its top singular vectors.

    W <- (1 - lr wd) W - lr scale N P^T,  N = Adam(G P).  Memory: 2 m r + n r values.

    Args:
        rank: the paper uses 128 / 256 / 256 / 512 for LLaMA 60M / 130M / 350M / 1B.
        update_proj_gap: updates between decompositions.
        scale: the paper's alpha. A projected matrix moves by lr * scale, other parameters by lr:
            give them learning rates of their own (`param_groups`).
        projector: "svd" is the paper's; "power" finds practically the same subspace without it.
        on_refresh: "keep" is the paper's code; "rotate" and "align" keep the moments meaningful.
        For the other arguments and errors see `LowRank`.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507. Unlike the authors' code, eps is outside the corrected root
        and decay comes before the update, as in `torch.optim.AdamW`, and the signs of the singular
        vectors are fixed.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        projector: str | Projector = "svd",
        on_refresh: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, projector=projector, on_refresh=on_refresh, rule=Adam(), residual=Drop(),
            **common,
        )  # fmt: skip


class DCTAdamW(LowRank):
    """AdamW on the columns of the discrete cosine basis that carry most of the gradient.

    W <- (1 - lr wd) W - lr scale N P^T,  P = Q[:, index].  Memory: 2 m r values and r integers,
    and one n x n basis for all layers of a width.

    Args:
        update_proj_gap: 1 chooses anew at every update, which a fixed basis makes cheap.
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
        rank: int | float | None = None,
        update_proj_gap: int = 1,
        scale: float = 1.0,
        projector: str | Projector = "dct",
        on_refresh: str = "rotate",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, projector=projector, on_refresh=on_refresh, rule=Adam(), residual=Drop(),
            **common,
        )  # fmt: skip


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

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        limiter: float | None = 1.01,
        projector: str | Projector = "svd",
        on_refresh: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, projector=projector, on_refresh=on_refresh, rule=Adam(),
            residual=NormScaled(limiter), **common,
        )  # fmt: skip


class FrugalAdamW(LowRank):
    """AdamW on a part of the columns or matrices, sign descent without state on the rest.

    W <- (1 - lr wd) W - lr (scale N P^T + state_free_scale sgn(G - G P P^T)).
    Memory: 2 m r values and r integers.

    Args:
        rank: the paper's density as a float, a quarter by default.
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
        rank: int | float | None = 0.25,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        projector: str | Projector = "columns",
        on_refresh: str = "reset",
        state_free: str = "sign",
        state_free_scale: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, projector=projector, on_refresh=on_refresh, rule=Adam(),
            residual=StateFree(state_free, state_free_scale), **common,
        )  # fmt: skip


class ApolloAdamW(LowRank):
    """The whole gradient, each row scaled as AdamW would scale it in a random subspace.

    W <- (1 - lr wd) W - lr phi * G, see `GradScaled`.  Memory: 2 m r + 1 values and a step number.

    Args:
        rank: 1 gives APOLLO-Mini, one factor a matrix.
        scale: the paper's alpha, of which the root counts. Our basis is orthonormal: at scale 1 the
            step is as long as AdamW's; the paper's length is scale = rank / n.
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
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        projector: str | Projector = "random",
        limiter: float | None = 1.01,
        on_refresh: str = "keep",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, rank=rank, update_proj_gap=update_proj_gap,
            scale=scale, projector=projector, on_refresh=on_refresh, rule=Adam(),
            residual=GradScaled(limiter), **common,
        )  # fmt: skip
