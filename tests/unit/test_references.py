"""The references against first principles and against each other; the package takes no part."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch

import helpers.references as ref

TALL, WIDE, SQUARE = (11, 7), (7, 11), (9, 9)
SHAPES = [TALL, WIDE, SQUARE]
EXACT = {"rtol": 0, "atol": 1e-12}


def gradients(shape, steps, seed=0):
    """A gradient a step with a slowly moving mean, so that subspaces overlap and norms vary."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal(shape)
    for t in range(steps):
        yield mean + rng.standard_normal(shape) * (1 + t % 3)


def weights(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def run(method, shape, steps=9, seed=0):
    W = weights(shape)
    for G in gradients(shape, steps, seed):
        W = method.step(W, G)
    return W


def run_torch(make, shape, steps=9, seed=0):
    W = torch.nn.Parameter(torch.tensor(weights(shape)))
    optimizer = make([W])
    for G in gradients(shape, steps, seed):
        W.grad = torch.tensor(G)
        optimizer.step()
    return W.detach().numpy()


def orthonormal(n, r, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, r)))[0]


def identity(n):
    return ref.Given(lambda k: np.eye(n))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maximize", [False, True])
def test_galore_in_the_identity_basis_is_adamw(shape, maximize):
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}
    n = min(shape)
    ours = ref.GaLore(n, subspace=identity(n), update_proj_gap=4, maximize=maximize, **settings)
    theirs = run_torch(lambda p: torch.optim.AdamW(p, maximize=maximize, **settings), shape)
    np.testing.assert_allclose(run(ours, shape), theirs, **EXACT)


def test_lr_may_change_between_steps():
    shape, n = TALL, min(TALL)
    ours = ref.GaLore(n, lr=1e-2, weight_decay=0.1, subspace=identity(n))
    W = torch.nn.Parameter(torch.tensor(weights(shape)))
    theirs = torch.optim.AdamW([W], lr=1e-2, weight_decay=0.1)
    mine = weights(shape)
    for t, G in enumerate(gradients(shape, 6)):
        ours.lr = theirs.param_groups[0]["lr"] = 1e-2 / (t + 1)
        mine = ours.step(mine, G)
        W.grad = torch.tensor(G)
        theirs.step()
    np.testing.assert_allclose(mine, W.detach().numpy(), **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_frugal_with_all_columns_is_adamw_started_anew_at_each_refresh(shape):
    n, gap = min(shape), 4
    ours = ref.Frugal(n, lr=1e-2, subspace=ref.Columns(lambda k: range(n)), update_proj_gap=gap)
    W = torch.nn.Parameter(torch.tensor(weights(shape)))
    mine = weights(shape)
    for t, G in enumerate(gradients(shape, 10)):
        if t % gap == 0:
            theirs = torch.optim.AdamW([W], lr=1e-2, weight_decay=0.0)
        mine = ours.step(mine, G)
        W.grad = torch.tensor(G)
        theirs.step()
    np.testing.assert_allclose(mine, W.detach().numpy(), **EXACT)


def test_sgdm_in_the_identity_basis_is_torch_sgd():
    n = min(TALL)
    ours = ref.GaLore(n, lr=1e-2, betas=(0.7, 0.0), rule="sgdm", subspace=identity(n))
    theirs = run_torch(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.7), TALL)
    np.testing.assert_allclose(run(ours, TALL), theirs, **EXACT)


def test_lion_in_the_identity_basis_step_by_step():
    n, lr, b1, b2 = min(TALL), 1e-2, 0.9, 0.8
    ours = ref.GaLore(n, lr=lr, betas=(b1, b2), rule="lion", subspace=identity(n))
    W = mine = weights(TALL)
    M = np.zeros(TALL)
    for G in gradients(TALL, 6):
        mine = ours.step(mine, G)
        W = W - lr * np.where(b1 * M + (1 - b1) * G > 0, 1.0, -1.0)
        M = b2 * M + (1 - b2) * G
        np.testing.assert_allclose(mine, W, **EXACT)


METHODS = {
    "galore": lambda **k: ref.GaLore(3, update_proj_gap=4, **k),
    "galore-rotate": lambda **k: ref.GaLore(3, update_proj_gap=4, on_refresh="rotate", **k),
    "galore-align": lambda **k: ref.GaLore(3, update_proj_gap=4, on_refresh="align", **k),
    "galore-lion": lambda **k: ref.GaLore(3, update_proj_gap=4, rule="lion", **k),
    "fira": lambda **k: ref.Fira(3, scale=0.25, update_proj_gap=4, **k),
    "frugal-svd": lambda **k: ref.Frugal(3, update_proj_gap=4, **k),
    "frugal-columns": lambda **k: ref.Frugal(
        3, update_proj_gap=4, subspace=ref.Columns([[0, 2, 5], [1, 2, 3], [4, 5, 6]]), **k
    ),
    "dct": lambda **k: ref.DCTAdamW(3, **k),
    "apollo": lambda **k: ref.Apollo(
        3, update_proj_gap=4, subspace=ref.Given(lambda k: orthonormal(7, 3, k)), **k
    ),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_wide_is_the_transposed_tall_problem(make):
    wide, tall = make(lr=1e-2, weight_decay=0.1), make(lr=1e-2, weight_decay=0.1)
    W = V = weights(WIDE)
    for G in gradients(WIDE, 9):
        W = wide.step(W, G)
        V = tall.step(V.T, G.T).T
        np.testing.assert_array_equal(W, V)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_galore_as_its_paper_writes_each_side(shape, side):
    """Left: R = P^T G, W <- W - lr P N; right: R = G P, W <- W - lr N P^T."""
    r, lr, b1, b2 = 3, 1e-2, 0.9, 0.99
    ours = ref.GaLore(r, lr=lr, betas=(b1, b2), eps=1e-8, side=side, update_proj_gap=5)
    W = mine = weights(shape)
    M = V = 0.0
    for t, G in enumerate(gradients(shape, 9), 1):
        mine = ours.step(mine, G)
        if (t - 1) % 5 == 0:
            U, _, Vt = np.linalg.svd(G)
            P = ref.canonical_signs(U[:, :r] if side == "left" else Vt[:r].T)
        R = P.T @ G if side == "left" else G @ P
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
        N = M / (1 - b1**t) / (np.sqrt(V / (1 - b2**t)) + 1e-8)
        W = W - lr * (P @ N if side == "left" else N @ P.T)
        np.testing.assert_allclose(mine, W, rtol=0, atol=1e-9)


def test_auto_projects_the_shorter_axis_and_the_columns_of_a_square():
    for shape, side in [(TALL, "right"), (WIDE, "left"), (SQUARE, "right")]:
        auto = run(ref.GaLore(3, update_proj_gap=4), shape)
        np.testing.assert_array_equal(auto, run(ref.GaLore(3, update_proj_gap=4, side=side), shape))


def test_svd_basis_is_the_best_subspace_and_its_signs_are_canonical():
    G = next(gradients(TALL, 1))
    P = ref.top_right_singular_vectors(G, 3)
    np.testing.assert_allclose(P.T @ P, np.eye(3), **EXACT)
    tail = np.linalg.svd(G, compute_uv=False)[3:]
    assert np.linalg.norm(G - G @ P @ P.T) == pytest.approx(np.linalg.norm(tail), abs=1e-12)
    assert (P[np.argmax(np.abs(P), axis=0), range(3)] > 0).all()
    np.testing.assert_allclose(ref.top_right_singular_vectors(-G, 3), P, **EXACT)


@pytest.mark.parametrize("gap", [1, 4, 100])
def test_refreshes_fall_on_steps_1_and_every_gap_after(gap):
    seen, t = [], 0

    def basis(k):
        seen.append(t)
        return np.eye(7)[:, :3]

    method = ref.GaLore(3, update_proj_gap=gap, subspace=ref.Given(basis))
    W = weights(TALL)
    for t, G in enumerate(gradients(TALL, 9), 1):  # noqa: B007
        W = method.step(W, G)
    assert seen == [t for t in range(1, 10) if (t - 1) % gap == 0]
    assert method.rule.t == 9


def test_one_rotation_is_ldadams_estimate_written_out_by_element():
    rng = np.random.default_rng(0)
    b1, b2, m, r = 0.5, 0.99, 12, 3
    rule = ref.Adam((b1, b2))
    for t in range(4):
        rule.direction(rng.standard_normal((m, r)) * 3**t)
    M, V, Q = rule.M, rule.V, orthonormal(7, r, 1).T @ orthonormal(7, r, 2)
    rule.rotate(Q)
    negative = 0
    for i in range(m):
        for k in range(r):
            mean = sum(M[i, j] * Q[j, k] for j in range(r))
            second = (mean / (1 - b1**4)) ** 2
            for j in range(r):
                variance = V[i, j] / (1 - b2**4) - (M[i, j] / (1 - b1**4)) ** 2
                second += variance * Q[j, k] ** 2
            negative += second < 0
            assert rule.M[i, k] == pytest.approx(mean, rel=1e-12)
            assert rule.V[i, k] == pytest.approx(abs(second) * (1 - b2**4), rel=1e-10)
    assert negative > 0


def test_rotation_into_the_same_basis_changes_nothing():
    P = orthonormal(7, 3)
    still = ref.GaLore(3, lr=1e-2, subspace=ref.Given(lambda k: P))
    turned = ref.GaLore(
        3, lr=1e-2, subspace=ref.Given(lambda k: P), update_proj_gap=2, on_refresh="rotate"
    )
    np.testing.assert_allclose(run(turned, TALL), run(still, TALL), **EXACT)


def test_rotated_momentum_does_not_see_a_turn_of_the_basis_within_its_span():
    """Momentum is linear: N P^T is the same for P and P O, if M follows."""
    P = orthonormal(7, 3)
    still = ref.GaLore(3, lr=1e-2, rule="sgdm", subspace=ref.Given(lambda k: P))
    turned = ref.GaLore(
        3,
        lr=1e-2,
        rule="sgdm",
        subspace=ref.Given(lambda k: P @ orthonormal(3, 3, k)),
        update_proj_gap=2,
        on_refresh="rotate",
    )
    np.testing.assert_allclose(run(turned, TALL), run(still, TALL), **EXACT)


def test_aligned_basis_keeps_its_new_span_and_turns_to_the_old_basis():
    old, new = orthonormal(7, 3, 1), orthonormal(7, 3, 2)
    subspace = ref.Given([old, new])
    method = ref.GaLore(3, subspace=subspace, update_proj_gap=1, on_refresh="align")
    run(method, TALL, steps=2)
    P = subspace.P
    np.testing.assert_allclose(P @ P.T, new @ new.T, **EXACT)
    overlap = P.T @ old
    np.testing.assert_allclose(overlap, overlap.T, **EXACT)
    assert np.linalg.eigvalsh(overlap).min() > 0


def test_align_undoes_a_turn_within_the_span():
    P = orthonormal(7, 3)
    still = ref.GaLore(3, lr=1e-2, subspace=ref.Given(lambda k: P))
    turned = ref.GaLore(
        3,
        lr=1e-2,
        subspace=ref.Given(lambda k: P if k == 0 else P @ orthonormal(3, 3, k)),
        update_proj_gap=2,
        on_refresh="align",
    )
    np.testing.assert_allclose(run(turned, TALL), run(still, TALL), **EXACT)


def test_the_four_ways_of_carrying_moments_differ():
    ends = [
        run(ref.GaLore(3, lr=1e-2, update_proj_gap=4, on_refresh=way), TALL)
        for way in ("keep", "reset", "rotate", "align")
    ]
    for i in range(4):
        for j in range(i):
            assert np.abs(ends[i] - ends[j]).max() > 1e-4


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_dct_basis_is_orthonormal_and_scipys(n):
    Q = ref.dct_basis(n)
    G = np.random.default_rng(0).standard_normal((5, n))
    np.testing.assert_allclose(Q.T @ Q, np.eye(n), **EXACT)
    np.testing.assert_allclose(G @ Q, scipy.fft.dct(G, type=2, norm="ortho", axis=1), **EXACT)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_dct_picks_the_largest_scores_sorted(norm):
    G = next(gradients(TALL, 1))
    S = scipy.fft.dct(G, type=2, norm="ortho", axis=1)
    scores = np.abs(S).sum(axis=0) if norm == "l1" else (S**2).sum(axis=0)
    index = ref.DCT(norm).pick(G, 3)
    assert sorted(index) == list(index)
    assert scores[index].min() > np.delete(scores, index).max()


def test_selection_copies_what_stays_and_zeroes_what_is_new():
    X = np.arange(1.0, 7).reshape(2, 3)
    Y = ref.select_columns(X, old=np.array([1, 4, 6]), new=np.array([0, 4, 1]))
    np.testing.assert_array_equal(Y, [[0, 2, 1], [0, 5, 4]])


def test_selection_is_the_rotation_between_columns_of_one_basis():
    """With a 0/1 overlap LDAdam's estimate reduces to copying: the two ways must agree."""
    Q, picked = ref.dct_basis(7), []

    class Recorded(ref.DCT):
        def pick(self, G, rank):
            picked.append(super().pick(G, rank))
            return picked[-1]

    selected = run(ref.DCTAdamW(3, lr=1e-2, subspace=Recorded()), TALL)
    assert len({tuple(index) for index in picked}) > 2
    rotated = ref.GaLore(
        3,
        lr=1e-2,
        subspace=ref.Given(lambda k: Q[:, picked[k]]),
        update_proj_gap=1,
        on_refresh="rotate",
    )
    np.testing.assert_allclose(run(rotated, TALL), selected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("state_free", ["sign", "sgd", "none"])
def test_frugal_columns_are_the_generic_basis_of_unit_vectors(state_free):
    picks = [[5, 0, 3], [1, 2, 3], [6, 4, 0]]
    settings = {"lr": 1e-2, "state_free": state_free, "state_free_scale": 0.5, "scale": 0.7}
    columns = ref.Frugal(3, subspace=ref.Columns(picks), update_proj_gap=4, **settings)
    units = ref.Given([np.eye(7)[:, i] for i in picks])
    generic = ref.Frugal(3, subspace=units, update_proj_gap=4, **settings)
    np.testing.assert_allclose(run(columns, TALL), run(generic, TALL), **EXACT)


@pytest.mark.parametrize("state_free", ["sign", "sgd", "none"])
def test_frugal_steps_adam_on_its_columns_and_the_state_free_rule_on_the_others(state_free):
    index, other, lr, c = [0, 2, 5], [1, 3, 4, 6], 1e-2, 0.5
    method = ref.Frugal(
        3,
        lr=lr,
        subspace=ref.Columns([index]),
        state_free=state_free,
        state_free_scale=c,
    )
    adam = ref.GaLore(3, lr=lr, subspace=identity(3))
    W = weights(TALL)
    for G in gradients(TALL, 6):
        new = method.step(W, G)
        np.testing.assert_allclose(new[:, index], adam.step(W[:, index], G[:, index]), **EXACT)
        move = {"sign": np.sign(G), "sgd": G, "none": 0 * G}[state_free]
        np.testing.assert_allclose(new[:, other], (W - lr * c * move)[:, other], **EXACT)
        W = new


def test_frugal_without_a_state_free_part_is_galore_with_reset():
    frugal = ref.Frugal(3, lr=1e-2, scale=0.5, state_free="none", update_proj_gap=4)
    galore = ref.GaLore(3, lr=1e-2, scale=0.5, on_refresh="reset", update_proj_gap=4)
    np.testing.assert_array_equal(run(frugal, TALL), run(galore, TALL))


def test_fira_forms_agree_at_scale_one_and_differ_below():
    def end(form, scale):
        return run(ref.Fira(3, lr=1e-2, scale=scale, form=form, update_proj_gap=4), TALL)

    np.testing.assert_array_equal(end("code", 1.0), end("paper", 1.0))
    assert np.abs(end("code", 0.25) - end("paper", 0.25)).max() > 1e-4


@pytest.mark.parametrize("form", ["code", "paper"])
def test_fira_in_its_low_rank_and_row_factor_form(form):
    """W - lr (A P^T + f G), A = scale N - k f R, f = lim phi; s by the norm identity."""
    lr, scale, gamma, b1, b2 = 1e-2, 0.25, 1.01, 0.9, 0.999
    k = scale if form == "code" else 1.0
    method = ref.Fira(3, lr=lr, scale=scale, form=form, update_proj_gap=4)
    twin = ref.GaLore(3, lr=lr, update_proj_gap=4)
    W, s_prev, limited = weights(TALL), None, 0
    for t, G in enumerate(gradients(TALL, 9), 1):
        new = method.step(W, G)
        N = (W - twin.step(W, G)) @ twin.subspace.P / lr
        R = G @ twin.subspace.P
        phi = np.linalg.norm(N, axis=1) / (np.linalg.norm(R, axis=1) + 1e-8)
        dropped = (G**2).sum(1) - (2 * k - k * k) * (R**2).sum(1)
        s = math.sqrt((phi**2 * dropped).sum()) * (1 - b1**t) / math.sqrt(1 - b2**t)
        bound = math.inf if s_prev is None else gamma * s_prev
        limited += s > bound
        s_prev = min(s, bound)
        f = (s_prev / s * phi)[:, None]
        A = scale * N - k * f * R
        np.testing.assert_allclose(new, W - lr * (A @ twin.subspace.P.T + f * G), atol=1e-10)
        assert method.limiter.s_prev == pytest.approx(s_prev)
        W = new
    assert 0 < limited < 8


def test_fira_residual_rows_have_adams_gain():
    """Without a limiter and for k = 1 the dropped part of a row grows as its kept part did."""
    method = ref.Fira(3, lr=1.0, form="paper", limiter=math.inf)
    W = weights(TALL)
    for G in gradients(TALL, 4):
        step = W - method.step(W, G)
        P = method.subspace.P
        kept, dropped = step @ P, step - step @ P @ P.T
        gain = ref.row_norms(kept) / ref.row_norms(G @ P)
        np.testing.assert_allclose(dropped, gain * (G - G @ P @ P.T), rtol=1e-6, atol=1e-9)


def test_limiter_lets_a_norm_grow_by_gamma_a_step():
    limiter = ref.Limiter(1.01)
    assert limiter(5.0) == 1.0
    assert limiter(5.04) == 1.0
    kept = 5.04
    for s in (50.0, 50.0, 7.0, 1.0, 3.0):
        bound = 1.01 * kept
        kept = s * limiter(s)
        assert kept == pytest.approx(min(s, bound))
        assert limiter.s_prev == pytest.approx(kept)


def test_a_zero_norm_leaves_the_limiter_as_it_was():
    limiter = ref.Limiter()
    assert limiter(0.0) == 1.0
    assert limiter.s_prev is None
    limiter(2.0)
    assert limiter(0.0) == 1.0
    assert limiter.s_prev == 2.0


@pytest.mark.parametrize("make", [ref.Fira, ref.Apollo])
def test_limiter_holds_a_burst(make):
    """A gradient 1000 times larger may grow the limited part by gamma, before bias correction."""
    b1, b2 = 0.9, 0.999
    method = make(3, lr=1.0, betas=(b1, b2), subspace=ref.Given(lambda k: orthonormal(7, 3)))
    free = make(
        3, lr=1.0, betas=(b1, b2), limiter=math.inf, subspace=ref.Given(lambda k: orthonormal(7, 3))
    )
    W = np.zeros(TALL)
    P = orthonormal(7, 3)
    norms = []
    for t, G in enumerate(gradients(TALL, 4), 1):
        if t == 3:
            G = 1000 * G
        D = -method.step(W, G)
        if make is ref.Fira:
            D = D - D @ P @ P.T
            open_end = np.linalg.norm(free.step(W, G) @ (np.eye(7) - P @ P.T))
        else:
            open_end = np.linalg.norm(free.step(W, G))
        norms.append(np.linalg.norm(D) * (1 - b1**t) / math.sqrt(1 - b2**t))
        if t == 3:
            assert np.linalg.norm(D) < 0.9 * open_end
    assert all(new <= 1.01 * old * (1 + 1e-9) for old, new in itertools.pairwise(norms))


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_apollo_scales_the_raw_gradient(per):
    """At full rank the rows (or the tensor) have the norm Adam's own step would have."""
    n, scale = min(TALL), 4.0
    method = ref.Apollo(n, lr=1.0, per=per, scale=scale, limiter=math.inf, subspace=identity(n))
    adam = ref.GaLore(n, lr=1.0, subspace=identity(n))
    W = weights(TALL)
    for G in gradients(TALL, 5):
        D, N = W - method.step(W, G), W - adam.step(W, G)
        norm = ref.row_norms if per == "row" else np.linalg.norm
        np.testing.assert_allclose(D, 2.0 * norm(N) / norm(G) * G, rtol=1e-6)


def test_apollo_per_tensor_at_rank_one():
    P = orthonormal(7, 1)
    method = ref.Apollo(1, lr=1.0, per="tensor", limiter=math.inf, subspace=ref.Given([P]))
    rule = ref.Adam()
    W = weights(TALL)
    for G in gradients(TALL, 5):
        R = G @ P
        N = rule.direction(R)
        factor = math.sqrt((N**2).sum()) / (math.sqrt((R**2).sum()) + 1e-8)
        np.testing.assert_allclose(method.step(W, G), W - factor * G, **EXACT)


def test_dct_composes_with_fira_and_frugal():
    for make in (ref.Fira, ref.Frugal):
        method = make(3, subspace=ref.DCT(), update_proj_gap=1, on_refresh="rotate")
        assert np.isfinite(run(method, WIDE)).all()


def test_a_step_changes_neither_of_its_arguments():
    for make in METHODS.values():
        method = make(weight_decay=0.1)
        W, G = weights(WIDE), next(gradients(WIDE, 1))
        before = W.copy(), G.copy()
        method.step(W, G)
        np.testing.assert_array_equal(W, before[0])
        np.testing.assert_array_equal(G, before[1])
