"""Methods for whole matrices, and with something carried, once more in plain float64 numpy.

As in `references`: slow, dense, from the formulas. W and G come in the user's orientation; `_step`
and below see the projected axis last.
"""

from __future__ import annotations

import math

import numpy as np

from helpers.references import DCT, Adam, Array, Given, Limiter, LowRank, top_right_singular_vectors


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


class Compensated(LowRank):
    """D = scale (N P^T + c lim C);  C_i = sqrt(cols - rank) (G - R P^T)_i / sqrt(p_i);

    p_i <- beta p_i + (1-beta) e_i from the first e_i that is not 0, with e_i = |G_i|^2 - |R_i|^2
    or, if that is less, |G_i|^2 / 256.

    Reference: Alice, Gong et al., arXiv 2502.07752.
    """

    rule: Adam

    def __init__(
        self, rank: int, *, compensation: float, limiter: float, beta: float = 0.9, **kwargs
    ):
        super().__init__(rank, **kwargs)
        self.compensation = compensation
        self.limiter = Limiter(limiter)
        self.beta = beta
        self.p: Array | None = None

    def update(self, G: Array, R: Array, N: Array) -> Array:
        whole = (G * G).sum(axis=1)
        e = np.maximum(whole - (R * R).sum(axis=1), whole / 256)
        p = np.zeros_like(e) if self.p is None else self.p
        self.p = np.where(p == 0, e, self.beta * p + (1 - self.beta) * e)
        rest = G - R @ self.subspace.P.T
        C = math.sqrt(G.shape[1] - self.rank) * rest / np.sqrt(self.p)[:, None]
        lim = self.limiter(np.linalg.norm(C))
        return self.scale * (N @ self.subspace.P.T + self.compensation * lim * C)
