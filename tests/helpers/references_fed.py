"""Methods that carry something of full size to the next step, once more in plain float64 numpy.

As in `references_whole`: slow, dense, from the formulas.
"""

from __future__ import annotations

import numpy as np

from helpers.references import DCT, Array, Given, LowRank, top_right_singular_vectors
from helpers.references_whole import Method, length_of, newton_schulz


class Trion(Method):
    """B = M + G;  P = Q[:, index] chosen by |B Q|_1;  b = B P;  M <- B - (1-mu) b P^T;

    D = scale s NS(b) P^T, s from the shape of W.  Reference: arXiv 2505.17967.
    """

    def __init__(self, rank: int, *, momentum: float = 0.95, length: str = "original", **kwargs):
        super().__init__(rank, subspace=DCT("l1"), **kwargs)
        self.momentum = momentum
        self.length = length
        self.M: Array | float = 0.0

    def direction(self, G: Array) -> Array:
        B = self.M + G
        P = self.subspace.basis(B.shape[1])[:, self.subspace.pick(B, self.rank)]
        b = B @ P
        self.M = B - (1 - self.momentum) * b @ P.T
        return self.scale * length_of(self.length, self.shape) * newton_schulz(b) @ P.T


class ErrorFeedback:
    """Any method with A = G + E in place of G;  E <- A - (1-keep) (A P) P^T, as W lies."""

    lr: float

    def __init__(self, method: LowRank, keep: float = 0.0):
        self.method = method
        self.keep = keep
        self.E: Array | float = 0.0

    def step(self, W: Array, G: Array) -> Array:
        self.method.lr = self.lr
        A = G + self.E
        W = self.method.step(W, A)
        P = self.method.subspace.P
        used = A @ P @ P.T if W.shape[0] >= W.shape[1] else P @ P.T @ A
        self.E = A - (1 - self.keep) * used
        return W


class LDAdam(Method):
    """A = G + E;  P' given;  moments rotated with Q = P^T P';  R = A P';  D = scale Adam(R) P'^T;

    E <- A - R P'^T + b1/(1-b1) (M P^T - M Q P'^T), M the first moment before Q and this step.
    `lessons` are what P' should be learnt from: A, later rho M/(1-b1^(t-1)) P^T + (1-rho) A.

    Reference: LDAdam, Robert et al., arXiv 2410.16103.
    """

    def __init__(self, rank: int, bases: list[Array], *, rho: float, **kwargs):
        super().__init__(rank, subspace=Given(bases), **kwargs)
        self.rho = rho
        self.E: Array | float = 0.0
        self.lessons: list[Array] = []

    def direction(self, G: Array) -> Array:
        b1 = self.rule.betas[0]
        A = G + self.E
        old = self.subspace.P
        new = self.subspace.P = self.subspace.choose(A, self.rank)
        lost = 0.0
        if old is None:
            self.lessons.append(A)
        else:
            M = self.rule.M @ old.T
            self.lessons.append(self.rho * M / (1 - b1 ** (self.t - 1)) + (1 - self.rho) * A)
            self.rule.rotate(old.T @ new)
            lost = M - self.rule.M @ new.T
        R = A @ new
        N = self.rule.direction(R)
        self.E = A - R @ new.T + b1 / (1 - b1) * lost
        return self.scale * N @ new.T


class Conda(Method):
    """M <- b1 M + (1-b1) G;  P at refreshes: right singular vectors of the new M, canonical signs;

    V <- b2 V + (1-b2) (G P)^2;  N = (M P / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps);  D = scale N P^T

    Reference: Conda, Wang et al., arXiv 2509.24218.
    """

    def __init__(self, rank: int, *, betas: tuple[float, float], eps: float, **kwargs):
        super().__init__(rank, **kwargs)
        self.betas = betas
        self.eps = eps
        self.M: Array | float = 0.0
        self.V: Array | float = 0.0

    def direction(self, G: Array) -> Array:
        b1, b2 = self.betas
        self.M = b1 * self.M + (1 - b1) * G
        if self.due:
            self.P = top_right_singular_vectors(self.M, min(self.rank, G.shape[1]))
        self.V = b2 * self.V + (1 - b2) * (G @ self.P) ** 2
        m_hat = self.M @ self.P / (1 - b1**self.t)
        v_hat = self.V / (1 - b2**self.t)
        return self.scale * (m_hat / (np.sqrt(v_hat) + self.eps)) @ self.P.T
