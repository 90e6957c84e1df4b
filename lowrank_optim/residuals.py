"""What becomes of the part of the gradient that the projection drops.

Notation: G the gradient, R = G P its projection, N the rule's direction on R, k the group's
`scale`, all with the projected axis last; a row norm is over that axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import Norms, Want
from .plan import Group, Residual, Site, State, Update

TINY = 1e-8


def limit(norm: Tensor, state: State, growth: float | None) -> Tensor | float:
    """Return the factor that keeps a norm from growing faster than `growth` a step.

    s > growth * s_prev gives growth * s_prev / s, else 1; s_prev becomes the limited norm, in
    place. It starts as infinity (the first step is never limited), and a norm that is zero or not
    finite leaves it alone: a step without gradient must not stop all later ones.
    """
    if growth is None:
        return 1.0
    before: Tensor = state["residual_norm"]
    ceiling = growth * before
    counts = norm.isfinite() & (norm > 0)
    factor = torch.where(counts & (norm > ceiling), ceiling / norm, 1.0)
    before.copy_(torch.where(counts, torch.minimum(norm, ceiling), before))
    return factor[..., None, None].to(norm.dtype)


def limiter_state(batch: tuple[int, ...], site: Site, growth: float | None) -> State:
    """Return the state of `limit`: one number a matrix, or nothing without a limiter."""
    if growth is None:
        return {}
    return {"residual_norm": torch.full(batch, math.inf, dtype=site.dtype, device=site.device)}


def check_limiter(growth: float | None) -> None:
    """Raise ValueError unless `growth` is None or a number of at least 1."""
    if growth is None:
        return
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not growth >= 1:
        raise ValueError(f"limiter must be None or a number of at least 1, got {growth!r}")


@dataclass(frozen=True)
class Drop:
    """Nothing: the update stays in the subspace. A = k N.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", arXiv 2403.03507.
    """

    @property
    def want(self) -> Want:
        """The direction alone."""
        return Want(low=False, norms=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """No state."""
        return ()

    def init(self, batch: tuple[int, ...], site: Site) -> State:
        """Return no state."""
        return {}

    def sums(self, norms: Norms | None, rank: int, group: Group) -> None:
        """Return None: every row is updated for itself."""

    def update(
        self,
        norms: Norms | None,
        sums: Tensor | None,
        state: State,
        rank: int,
        group: Group,
        uncorrected: float | Tensor,
    ) -> Update:
        """Return k as the factor of N."""
        return Update(direction=group["scale"])


@dataclass(frozen=True)
class NormScaled:
    """Fira: keep the rest, scaled row by row by what the rule did inside the subspace.

    S = phi * (G - c R P^T),  phi_i = |N_i| / (|R_i| + 1e-8),  update = k N P^T + S, with |S|_F
    limited to `limiter` times its value of the step before. c = k in the authors' code, whose
    numbers are the published ones (`form="code"`), and 1 in the paper (`form="paper"`).
    |S|_F comes from row norms alone: |G_i - c R_i P^T|^2 = |G_i|^2 - (2c - c^2) |R_i|^2, where a
    difference below rounding noise is 0. It is measured before bias correction, as in the authors'
    code.

    Args:
        limiter: largest growth of the norm in one step; None for no limit.
        form: "code" or "paper".

    Raises:
        ValueError: an unknown form, or a limiter below 1.

    Reference: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
        Constraint?", arXiv 2410.01623. Unlike the authors' code, a zero norm is not remembered.
    """

    limiter: float | None = 1.01
    form: str = "code"

    def __post_init__(self) -> None:
        check_limiter(self.limiter)
        if self.form not in ("code", "paper"):
            raise ValueError(f'form must be "code" or "paper", got {self.form!r}')

    @property
    def want(self) -> Want:
        """Everything."""
        return Want()

    @property
    def keys(self) -> tuple[str, ...]:
        """The limiter's norm, if there is one."""
        return () if self.limiter is None else ("residual_norm",)

    def init(self, batch: tuple[int, ...], site: Site) -> State:
        """Return `residual_norm`, one number a matrix."""
        return limiter_state(batch, site, self.limiter)

    def sums(self, norms: Norms | None, rank: int, group: Group) -> Tensor | None:
        """Return |S|^2, one number a matrix, before bias correction is taken out of it."""
        if self.limiter is None:
            return None
        assert norms is not None
        kept = self._kept(group)
        whole_row = norms.grad.square()
        dropped = whole_row - (2 * kept - kept**2) * norms.low.square()
        noise = 16 * torch.finfo(dropped.dtype).eps * whole_row
        dropped.masked_fill_(dropped < noise, 0)
        return phi_of(norms).square_().mul_(dropped).sum(-2)

    def update(
        self,
        norms: Norms | None,
        sums: Tensor | None,
        state: State,
        rank: int,
        group: Group,
        uncorrected: float | Tensor,
    ) -> Update:
        """Return k as the factor of N, phi as that of G and -c phi as that of R, both limited."""
        assert norms is not None
        phi = phi_of(norms)
        if sums is not None:
            phi = phi * limit(sums[..., 0].sqrt() * uncorrected, state, self.limiter)
        return Update(direction=group["scale"], low=phi * -self._kept(group), grad=phi)

    def _kept(self, group: Group) -> float:
        return float(group["scale"]) if self.form == "code" else 1.0


@dataclass(frozen=True)
class StateFree:
    """FRUGAL: update the rest without state.

    A = k N inside; outside, with D = G - R P^T: c sgn(D) (`form="sign"`), c D ("sgd") or nothing
    ("none").

    Args:
        form: "sign", "sgd" or "none".
        scale: c, the factor of the state-free part, relative to the learning rate.

    Raises:
        ValueError: an unknown form, or a negative scale.

    Reference: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
        for Scalable Training", arXiv 2411.07837.
    """

    form: str = "sign"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.form not in ("sign", "sgd", "none"):
            raise ValueError(f'state_free must be "sign", "sgd" or "none", got {self.form!r}')
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not number or not 0 <= self.scale < math.inf:
            raise ValueError(f"state_free_scale must be a number from 0, got {self.scale!r}")

    @property
    def want(self) -> Want:
        """The direction, and the projected gradient if the rest is used."""
        return Want(low=self.form != "none", norms=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """No state."""
        return ()

    def init(self, batch: tuple[int, ...], site: Site) -> State:
        """Return no state."""
        return {}

    def sums(self, norms: Norms | None, rank: int, group: Group) -> None:
        """Return None: every row is updated for itself."""

    def update(
        self,
        norms: Norms | None,
        sums: Tensor | None,
        state: State,
        rank: int,
        group: Group,
        uncorrected: float | Tensor,
    ) -> Update:
        """Return k as the factor of N and c as that of the sign, or c of G and -c of R."""
        if self.form == "sign":
            return Update(direction=group["scale"], sign=self.scale)
        if self.form == "sgd":
            return Update(direction=group["scale"], low=-self.scale, grad=self.scale)
        return Update(direction=group["scale"])


@dataclass(frozen=True)
class GradScaled:
    """APOLLO: the whole gradient, scaled by what the rule did inside the subspace.

    update = phi * G,  phi_i = sqrt(k) |N_i| / (|R_i| + 1e-8), one factor a row or one a matrix,
    with |phi * G|_F limited to `limiter` times its value of the step before (measured before bias
    correction).

    Args:
        limiter: largest growth of the norm in one step; None for no limit.
        per: "row", "tensor" (APOLLO-Mini), or "auto": a tensor at rank 1, else a row.

    Raises:
        ValueError: an unknown `per`, or a limiter below 1.

    Reference: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270.
        The paper projects with a Gaussian of variance 1/rank; ours is orthonormal, which makes R
        smaller and phi larger by sqrt(cols / rank): at scale 1 the step is as long as AdamW's.
        `scale = rank / cols` gives the paper's length.
    """

    limiter: float | None = 1.01
    per: str = "auto"

    def __post_init__(self) -> None:
        check_limiter(self.limiter)
        if self.per not in ("auto", "row", "tensor"):
            raise ValueError(f'per must be "auto", "row" or "tensor", got {self.per!r}')

    @property
    def want(self) -> Want:
        """Norms alone: there is no lift."""
        return Want(low=False, direction=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """The limiter's norm, if there is one."""
        return () if self.limiter is None else ("residual_norm",)

    def init(self, batch: tuple[int, ...], site: Site) -> State:
        """Return `residual_norm`, one number a matrix."""
        return limiter_state(batch, site, self.limiter)

    def sums(self, norms: Norms | None, rank: int, group: Group) -> Tensor | None:
        """Return |phi * G|^2 for factors of rows, else |R|^2, |N|^2 and |G|^2 of each matrix."""
        assert norms is not None
        if self._by_matrix(rank):
            parts = (norms.low, norms.direction, norms.grad)
            return torch.cat([part.square().sum(-2) for part in parts], dim=-1)
        if self.limiter is None:
            return None
        scale: float = group["scale"]
        return (phi_of(norms) * norms.grad).square_().sum(-2) * scale

    def update(
        self,
        norms: Norms | None,
        sums: Tensor | None,
        state: State,
        rank: int,
        group: Group,
        uncorrected: float | Tensor,
    ) -> Update:
        """Return phi as the factor of G, and nothing else."""
        assert norms is not None
        root = math.sqrt(group["scale"])
        if sums is not None and self._by_matrix(rank):
            low, direction, grad = sums.sqrt().unbind(-1)
            factor = root * direction / (low + TINY)
            phi = factor[..., None, None].expand_as(norms.grad)
            return Update(grad=phi * limit(factor * grad * uncorrected, state, self.limiter))
        phi = root * phi_of(norms)
        if sums is not None:
            phi = phi * limit(sums[..., 0].sqrt() * uncorrected, state, self.limiter)
        return Update(grad=phi)

    def _by_matrix(self, rank: int) -> bool:
        return self.per == "tensor" or (self.per == "auto" and rank == 1)


def phi_of(norms: Norms) -> Tensor:
    """Return |N_i| / (|R_i| + 1e-8) of each row."""
    return norms.direction / (norms.low + TINY)


RESIDUALS: dict[str, Residual] = {
    "drop": Drop(),
    "norm_scaled": NormScaled(),
    "state_free": StateFree(),
    "grad_scaled": GradScaled(),
}
