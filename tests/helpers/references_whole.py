"""Rules for whole matrices once more in plain float64 numpy.

As in `references`: slow, dense, from the formulas. W and G come in the user's orientation; `_step`
and below see the projected axis last.
"""

from __future__ import annotations

import math

import numpy as np

from helpers.references import Array, Limiter, LowRank


def newton_schulz(X: Array, iterations: int = 5) -> Array:
    """X <- X/(|X|_F + 1e-7); then A = X^T X, X <- X (a I + b A + c A A), shorter axis last.

    Reference: Jordan et al., https://kellerjordan.github.io/posts/muon/.
    """
    if X.shape[0] < X.shape[1]:
        return newton_schulz(X.T, iterations).T
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / (np.linalg.norm(X) + 1e-7)
    for _ in range(iterations):
        A = X.T @ X
        X = X @ (a * np.eye(len(A)) + b * A + c * A @ A)
    return X


def length_of(kind: str, shape: tuple[int, int]) -> float:
    """The factor s of an orthogonal step on a weight of `shape` (out, in)."""
    outputs, inputs = shape
    return {
        "original": math.sqrt(max(1, outputs / inputs)),
        "match_rms_adamw": 0.2 * math.sqrt(max(outputs, inputs)),
        "dion": math.sqrt(outputs / inputs),
        "none": 1.0,
    }[kind]


class Method(LowRank):
    """W <- (1 - lr*wd) W - lr * D, D = `direction(G)` in full; `shape` is that of W as given."""

    def step(self, W: Array, G: Array) -> Array:
        self.shape = W.shape
        return super().step(W, G)

    def _step(self, W: Array, G: Array) -> Array:
        self.t += 1
        D = self.direction(G)
        return (1 - self.lr * self.weight_decay) * W - self.lr * D

    @property
    def due(self) -> bool:
        """Whether this step, counted already, refreshes the subspace."""
        return (self.t - 1) % self.update_proj_gap == 0

    def direction(self, G: Array) -> Array:
        raise NotImplementedError


class Muon(Method):
    """M <- mu M + G;  D = s NS(G + mu M) with nesterov, else s NS(M)."""

    def __init__(
        self, *, momentum: float = 0.95, nesterov: bool = True, length: str = "original", **kwargs
    ):
        super().__init__(0, side="right", **kwargs)
        self.momentum = momentum
        self.nesterov = nesterov
        self.length = length
        self.M: Array | float = 0.0

    def orthogonal(self, G: Array) -> Array:
        self.M = self.momentum * self.M + G
        return newton_schulz(G + self.momentum * self.M if self.nesterov else self.M)

    def direction(self, G: Array) -> Array:
        return self.scale * length_of(self.length, self.shape) * self.orthogonal(G)


class NorMuon(Muon):
    """O = NS(M);  v_i <- b2 v_i + (1-b2) mean_j O_ij^2 of each row i of W as given;

    O' = O / (sqrt(v) + 1e-8);  D = 0.2 sqrt(out in) O' / (|O'|_F + 1e-8)

    Reference: NorMuon, Li et al., arXiv 2510.05491.
    """

    def __init__(self, *, betas: tuple[float, float], nesterov: bool = False, **kwargs):
        super().__init__(betas=betas, nesterov=nesterov, **kwargs)
        self.decay = betas[1]
        self.v: Array | float = 0.0

    def direction(self, G: Array) -> Array:
        O = self.orthogonal(G)  # noqa: E741
        self.v = self.decay * self.v + (1 - self.decay) * (O * O).mean(axis=1, keepdims=True)
        O = O / (np.sqrt(self.v) + 1e-8)  # noqa: E741
        return self.scale * 0.2 * math.sqrt(O.size) * O / (np.linalg.norm(O) + 1e-8)


class RMNP(Method):
    """M <- mu M + (1-mu) G;  D_i = M_i / |M_i| for each row i of W as given, 0 where M_i = 0.

    Reference: Deng et al., arXiv 2603.20527.
    """

    def __init__(self, *, momentum: float = 0.95, **kwargs):
        super().__init__(0, side="right", **kwargs)
        self.momentum = momentum
        self.M: Array | float = 0.0

    def direction(self, G: Array) -> Array:
        self.M = self.momentum * self.M + (1 - self.momentum) * G
        norms = np.linalg.norm(self.M, axis=1, keepdims=True)
        return self.scale * self.M / np.where(norms == 0, 1, norms)


class RACS(Method):
    """5 times s = SQ^T q / |q|^2, q = SQ s / |s|^2 from q = 1, SQ = G*G;

    Q <- beta Q + (1-beta) q, S the same, from their first value;  D = scale lim G / sqrt(Q S^T)

    Reference: Gong et al., arXiv 2502.07752.
    """

    def __init__(self, *, beta: float = 0.9, limiter: float = 1.01, **kwargs):
        super().__init__(0, **kwargs)
        self.beta = beta
        self.limiter = Limiter(limiter)
        self.Q: Array | None = None
        self.S: Array | None = None

    def direction(self, G: Array) -> Array:
        SQ = G * G
        q = np.ones(len(SQ))
        for _ in range(5):
            s = SQ.T @ q / (q @ q)
            q = SQ @ s / (s @ s)
        if self.Q is None:
            self.Q, self.S = q, s
        else:
            self.Q = self.beta * self.Q + (1 - self.beta) * q
            self.S = self.beta * self.S + (1 - self.beta) * s
        N = G / np.sqrt(np.outer(self.Q, self.S))
        return self.scale * self.limiter(np.linalg.norm(N)) * N
