"""The methods once more, in plain float64 numpy: slow, dense, matrix by matrix.

Every formula is read from the specification of the methods, not from the package, so an engine that
agrees with these to 1e-10 has been derived twice. A method here is

    W <- (1 - lr*wd) W - lr * D,    D formed in full, m x n

`subspace` says where P comes from and how moments follow it, `rule` turns R = G P into a direction
N, and the method's class says what D is. W and G come in the user's orientation; inside, all is
viewed tall: the projected axis is the last one. `lr` and `weight_decay` are attributes and may be
changed between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
PerRefresh = Sequence[Array] | Callable[[int], Array]


def canonical_signs(P: Array) -> Array:
    """Scale each column by +-1 so that its entry of largest absolute value is positive."""
    P = P.copy()
    for j in range(P.shape[1]):
        if P[np.argmax(np.abs(P[:, j])), j] < 0:
            P[:, j] *= -1
    return P


def top_right_singular_vectors(G: Array, rank: int) -> Array:
    """P (n x r): the first r rows of V^T in G = U S V^T, as columns with canonical signs."""
    _, _, Vt = np.linalg.svd(G, full_matrices=False)
    return canonical_signs(Vt[:rank].T)


def dct_basis(n: int) -> Array:
    """Q[j,k] = c_k cos(pi (2j+1) k / (2n)), c_0 = sqrt(1/n), else sqrt(2/n): orthonormal DCT-II."""
    Q = np.empty((n, n))
    for k in range(n):
        c = math.sqrt(1 / n) if k == 0 else math.sqrt(2 / n)
        for j in range(n):
            Q[j, k] = c * math.cos(math.pi * (2 * j + 1) * k / (2 * n))
    return Q


def row_norms(X: Array) -> Array:
    """The Euclidean norm of each row, as an m x 1 column."""
    return np.sqrt((X * X).sum(axis=1, keepdims=True))


class Adam:
    """Adam with bias correction, `eps` outside the corrected root (as in torch.optim.AdamW).

    M <- b1 M + (1-b1) R;  V <- b2 V + (1-b2) R*R
    N  = (M / (1-b1^t)) / (sqrt(V / (1-b2^t)) + eps)
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas = betas
        self.eps = eps
        self.reset()

    def reset(self) -> None:
        self.t = 0
        self.M: Array | None = None
        self.V: Array | None = None

    def direction(self, R: Array) -> Array:
        b1, b2 = self.betas
        if self.M is None:
            self.M, self.V = np.zeros_like(R), np.zeros_like(R)
        self.t += 1
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R * R
        m_hat = self.M / (1 - b1**self.t)
        v_hat = self.V / (1 - b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)

    @property
    def before_correction(self) -> float:
        """What a norm of N is multiplied by to undo the bias correction: (1-b1^t)/sqrt(1-b2^t)."""
        b1, b2 = self.betas
        return (1 - b1**self.t) / math.sqrt(1 - b2**self.t)

    def rotate(self, Q: Array) -> None:
        """Carry the moments into the basis P_new, Q = P_old^T P_new (r x r), after t updates.

        m_hat = M/(1-b1^t);  v_hat = V/(1-b2^t);  M <- M Q
        V <- (1-b2^t) | (v_hat - m_hat*m_hat) (Q*Q) + (m_hat Q)*(m_hat Q) |

        Reference: LDAdam, Robert et al., arXiv 2410.16103.
        """
        if self.t == 0:
            return
        b1, b2 = self.betas
        m_hat = self.M / (1 - b1**self.t)
        v_hat = self.V / (1 - b2**self.t)
        variance = (v_hat - m_hat * m_hat) @ (Q * Q)
        self.V = (1 - b2**self.t) * np.abs(variance + (m_hat @ Q) ** 2)
        self.M = self.M @ Q

    def select(self, old: Array, new: Array) -> None:
        """Copy the columns of M and V whose index stays; the new ones start from zero."""
        self.M, self.V = select_columns(self.M, old, new), select_columns(self.V, old, new)


class Lion:
    """Lion: c = b1 M + (1-b1) R;  N = sign(c);  M <- b2 M + (1-b2) R."""

    before_correction = 1.0

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99), eps: float = 0.0):
        self.betas = betas
        self.reset()

    def reset(self) -> None:
        self.M: Array | None = None

    def direction(self, R: Array) -> Array:
        b1, b2 = self.betas
        if self.M is None:
            self.M = np.zeros_like(R)
        c = b1 * self.M + (1 - b1) * R
        self.M = b2 * self.M + (1 - b2) * R
        return np.sign(c)

    def rotate(self, Q: Array) -> None:
        """M <- M Q."""
        if self.M is not None:
            self.M = self.M @ Q

    def select(self, old: Array, new: Array) -> None:
        self.M = select_columns(self.M, old, new)


class SGDM(Lion):
    """SGD with momentum: M <- b1 M + R;  N = M."""

    def direction(self, R: Array) -> Array:
        if self.M is None:
            self.M = np.zeros_like(R)
        self.M = self.betas[0] * self.M + R
        return self.M.copy()


RULES = {"adam": Adam, "lion": Lion, "sgdm": SGDM}


def select_columns(X: Array | None, old: Array, new: Array) -> Array | None:
    """X P_old^T P_new for P_old, P_new columns of one orthonormal basis: a copy or a zero."""
    if X is None:
        return None
    Y = np.zeros((X.shape[0], len(new)))
    where = {int(i): j for j, i in enumerate(old)}
    for j, i in enumerate(new):
        if int(i) in where:
            Y[:, j] = X[:, where[int(i)]]
    return Y


class Subspace:
    """Where P (n x r) comes from, and what becomes of the moments when it changes."""

    P: Array | None = None

    def choose(self, G: Array, rank: int) -> Array:
        raise NotImplementedError

    def refresh(self, G: Array, rank: int, on_refresh: str, rule: Adam | Lion) -> None:
        old, new = self.P, self.choose(G, rank)
        if old is not None:
            if on_refresh == "reset":
                rule.reset()
            elif on_refresh == "rotate":
                rule.rotate(old.T @ new)
            elif on_refresh == "align":
                U, _, Vt = np.linalg.svd(new.T @ old)
                new = new @ U @ Vt
            elif on_refresh != "keep":
                raise ValueError(on_refresh)
        self.P = new

    def rest(self, G: Array, R: Array) -> Array:
        """What the projection drops: G - R P^T."""
        return G - R @ self.P.T


class SVD(Subspace):
    """The top-r right singular vectors of G, with canonical signs."""

    def choose(self, G: Array, rank: int) -> Array:
        return top_right_singular_vectors(G, rank)


class Given(Subspace):
    """Orthonormal bases from outside: P number k (from 0) is `bases[k]` or `bases(k)`, n x r."""

    def __init__(self, bases: PerRefresh):
        self.bases = bases
        self.count = 0

    def choose(self, G: Array, rank: int) -> Array:
        P = self.bases(self.count) if callable(self.bases) else self.bases[self.count]
        P = np.asarray(P, dtype=np.float64)
        if P.shape != (G.shape[1], rank):
            raise ValueError(f"basis {self.count} is {P.shape}, not {(G.shape[1], rank)}")
        self.count += 1
        return P


class Indexed(Subspace):
    """r columns of one orthonormal basis of the whole space: P_old^T P_new is a 0/1 selection."""

    index: Array | None = None

    def pick(self, G: Array, rank: int) -> Array:
        raise NotImplementedError

    def basis(self, n: int) -> Array:
        raise NotImplementedError

    def refresh(self, G: Array, rank: int, on_refresh: str, rule: Adam | Lion) -> None:
        old, new = self.index, np.asarray(self.pick(G, rank))
        if new.shape != (rank,):
            raise ValueError(f"{new.shape[0]} indices for rank {rank}")
        if old is not None:
            if on_refresh == "reset":
                rule.reset()
            elif on_refresh == "rotate":
                rule.select(old, new)
            elif on_refresh != "keep":
                raise ValueError(on_refresh)
        self.index = new
        self.P = self.basis(G.shape[1])[:, new]


class Columns(Indexed):
    """Coordinates from outside: index number k (from 0) is `indices[k]` or `indices(k)`."""

    def __init__(self, indices: PerRefresh):
        self.indices = indices
        self.count = 0

    def basis(self, n: int) -> Array:
        return np.eye(n)

    def pick(self, G: Array, rank: int) -> Array:
        index = self.indices(self.count) if callable(self.indices) else self.indices[self.count]
        self.count += 1
        return index

    def rest(self, G: Array, R: Array) -> Array:
        """G - R P^T, which is G with the chosen columns zeroed."""
        rest = G.copy()
        rest[:, self.index] = 0.0
        return rest


class DCT(Indexed):
    """The r columns of the DCT-II basis that G Q is largest in, indices sorted.

    S = G Q;  score_k = sum_i |S_ik| (l1) or sqrt(sum_i S_ik^2) (l2).
    Reference: arXiv 2505.17967.
    """

    def __init__(self, norm: str = "l1"):
        self.norm = norm

    def basis(self, n: int) -> Array:
        return dct_basis(n)

    def pick(self, G: Array, rank: int) -> Array:
        S = G @ dct_basis(G.shape[1])
        order = {"l1": 1, "l2": 2}[self.norm]
        scores = np.linalg.norm(S, ord=order, axis=0)
        return np.sort(np.argsort(-scores, kind="stable")[:rank])


class Limiter:
    """Norm-growth limiter: the factor that holds a norm s below gamma times the last one.

    lim = gamma s_prev / s if s > gamma s_prev else 1;  s_prev <- min(s, gamma s_prev)

    The first norm is not limited; s = 0 leaves s_prev as it is.
    """

    def __init__(self, gamma: float = 1.01):
        self.gamma = gamma
        self.s_prev: float | None = None

    def __call__(self, s: float) -> float:
        if s == 0:
            return 1.0
        if self.s_prev is None or s <= self.gamma * self.s_prev:
            self.s_prev = s
            return 1.0
        self.s_prev = self.gamma * self.s_prev
        return self.s_prev / s


class LowRank:
    """What all methods share: orientation, refreshes at t = 1, T+1, 2T+1, ..., decay before update.

    Args:
        rank: r.
        lr, weight_decay: may be changed between steps.
        betas, eps: of the rule.
        scale, update_proj_gap: T steps between refreshes.
        subspace: SVD() unless given.
        rule: "adam", "lion" or "sgdm".
        side: "right" projects the columns (R = G P), "left" the rows (R^T = P^T G); "auto" projects
            the shorter axis, and the columns of a square matrix.
        on_refresh: what the moments do, "keep", "reset" (moments and their t), "rotate" or "align".
        maximize: step with -G.
    """

    def __init__(
        self,
        rank: int,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        update_proj_gap: int = 200,
        subspace: Subspace | None = None,
        rule: str = "adam",
        side: str = "auto",
        on_refresh: str = "keep",
        maximize: bool = False,
    ):
        self.rank = rank
        self.lr = lr
        self.weight_decay = weight_decay
        self.scale = scale
        self.update_proj_gap = update_proj_gap
        self.subspace = SVD() if subspace is None else subspace
        self.rule = RULES[rule](betas=betas, eps=eps)
        self.side = side
        self.on_refresh = on_refresh
        self.maximize = maximize
        self.t = 0

    def step(self, W: Array, G: Array) -> Array:
        """The weights after one step, in the orientation of W; nothing is changed in place."""
        if self.maximize:
            G = -G
        side = self.side
        if side == "auto":
            side = "right" if W.shape[0] >= W.shape[1] else "left"
        if side == "left":
            return self._step(W.T, G.T).T
        return self._step(W, G)

    def _step(self, W: Array, G: Array) -> Array:
        self.t += 1
        if (self.t - 1) % self.update_proj_gap == 0:
            self.subspace.refresh(G, self.rank, self.on_refresh, self.rule)
        R = G @ self.subspace.P
        N = self.rule.direction(R)
        W = (1 - self.lr * self.weight_decay) * W
        return W - self.lr * self.update(G, R, N)

    def update(self, G: Array, R: Array, N: Array) -> Array:
        """The full m x n matrix D of W <- W - lr D."""
        raise NotImplementedError


class GaLore(LowRank):
    """D = scale * N P^T. Reference: GaLore, Zhao et al., arXiv 2403.03507."""

    def update(self, G: Array, R: Array, N: Array) -> Array:
        return self.scale * N @ self.subspace.P.T


class DCTAdamW(GaLore):
    """GaLore's update in the DCT subspace, chosen anew each step. Reference: arXiv 2505.17967."""

    def __init__(self, rank: int, *, norm: str = "l1", **kwargs):
        settings = {"update_proj_gap": 1, "on_refresh": "rotate", "subspace": DCT(norm)}
        super().__init__(rank, **(settings | kwargs))


class Fira(LowRank):
    """D = scale * N P^T + lim * S,  S_i = ||N_i|| / (||R_i|| + 1e-8) * (G - k R P^T)_i.

    k = scale in the method's code (form="code"), 1 in its paper (form="paper"). The limiter sees
    ||S||_F (1-b1^t)/sqrt(1-b2^t). Reference: Fira, Chen et al., arXiv 2410.01623.
    """

    def __init__(self, rank: int, *, form: str = "code", limiter: float = 1.01, **kwargs):
        super().__init__(rank, **kwargs)
        self.form = form
        self.limiter = Limiter(limiter)

    def update(self, G: Array, R: Array, N: Array) -> Array:
        k = {"code": self.scale, "paper": 1.0}[self.form]
        phi = row_norms(N) / (row_norms(R) + 1e-8)
        S = phi * (G - k * R @ self.subspace.P.T)
        lim = self.limiter(np.linalg.norm(S) * self.rule.before_correction)
        return self.scale * N @ self.subspace.P.T + lim * S


class Frugal(LowRank):
    """D = scale * N P^T + c * f(G - R P^T),  f = sign, identity ("sgd") or nothing ("none").

    The moments and their t start anew at each refresh. Reference: FRUGAL, Zmushko et al.,
    arXiv 2411.07837.
    """

    def __init__(
        self, rank: int, *, state_free: str = "sign", state_free_scale: float = 1.0, **kwargs
    ):
        super().__init__(rank, **({"on_refresh": "reset"} | kwargs))
        self.state_free = state_free
        self.state_free_scale = state_free_scale

    def update(self, G: Array, R: Array, N: Array) -> Array:
        D = self.scale * N @ self.subspace.P.T
        if self.state_free == "none":
            return D
        rest = self.subspace.rest(G, R)
        free = {"sign": np.sign(rest), "sgd": rest}[self.state_free]
        return D + self.state_free_scale * free


class Apollo(LowRank):
    """D = lim * sqrt(scale) * ||N_i|| / (||R_i|| + 1e-8) * G_i, the factor a row's or the tensor's.

    The limiter sees ||phi G||_F (1-b1^t)/sqrt(1-b2^t). Reference: APOLLO, Zhu et al.,
    arXiv 2412.05270.
    """

    def __init__(self, rank: int, *, per: str = "row", limiter: float = 1.01, **kwargs):
        super().__init__(rank, **kwargs)
        self.per = per
        self.limiter = Limiter(limiter)

    def update(self, G: Array, R: Array, N: Array) -> Array:
        norm = {"row": row_norms, "tensor": np.linalg.norm}[self.per]
        phi = math.sqrt(self.scale) * norm(N) / (norm(R) + 1e-8)
        lim = self.limiter(np.linalg.norm(phi * G) * self.rule.before_correction)
        return lim * phi * G


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
