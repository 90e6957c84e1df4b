"""Ranks that follow the spectrum: the smallest that hold the share, within bounds and a budget."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cases import GAP, Model, assert_same, train, weights
from lowrank_optim import (
    AutoRank,
    DCTAdamW,
    ErrorFeedback,
    FiraAdamW,
    GaLoreAdamW,
    LowRank,
    LowRankAdamW,
    TrionW,
    param_groups,
    predicted_bytes,
    state_bytes,
)
from lowrank_optim.engine.adaptive_rank import largest, smallest, within
from lowrank_optim.parts.checks import bytes_in
from lowrank_optim.parts.rank import rank_asked

AUTO = AutoRank(share=0.6, least=0.1, most=0.9)
MAKES = {
    "svd": lambda p: GaLoreAdamW(p, rank=AUTO, min_dim=1, update_proj_gap=GAP, on_refresh="rotate"),
    "svd-keep": lambda p: GaLoreAdamW(p, rank=AUTO, min_dim=1, update_proj_gap=GAP),
    "power": lambda p: LowRankAdamW(
        p, rank=AUTO, min_dim=1, update_proj_gap=GAP, state_dtype="8bit"
    ),
    "dct": lambda p: DCTAdamW(p, rank=AUTO, min_dim=1),
    "reset": lambda p: FiraAdamW(p, rank=AUTO, min_dim=1, update_proj_gap=GAP, on_refresh="reset"),
    "trion": lambda p: TrionW(p, rank=AUTO, min_dim=1),
    "feedback": lambda p: GaLoreAdamW(
        p, rank=AUTO, min_dim=1, update_proj_gap=GAP, feed=ErrorFeedback()
    ),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def rank_of(optimizer, param):
    state = optimizer.state[param]
    return state["index" if "index" in state else "basis"].shape[-1]


def of_spectrum(values, rows=13):
    """A matrix with these singular values, and random singular vectors."""
    rng = torch.Generator().manual_seed(1)
    cols = len(values)
    left = torch.linalg.qr(torch.randn(rows, cols, generator=rng, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(cols, cols, generator=rng, dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right


@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=12),
    st.floats(0, 1e2),
    st.floats(0.01, 1.0),
)
@settings(deadline=None)
def test_smallest_is_the_first_sum_that_holds_the_share(energies, more, share):
    total = sum(energies) + more
    given = (torch.tensor(numbers, dtype=torch.float64) for numbers in (energies, total))
    found = int(smallest(*given, share))
    sums = list(itertools.accumulate(sorted(energies, reverse=True)))
    slack = 1e-9 * total
    assert 1 <= found <= len(energies)
    assert found == len(energies) or sums[found - 1] >= share * total - slack
    assert found == 1 or sums[found - 2] < share * total + slack


def test_largest_are_in_ascending_order():
    energies = torch.tensor([[3.0, 9.0, 1.0, 5.0], [1.0, 2.0, 8.0, 0.0]])
    assert largest(energies, 2).tolist() == [[1, 3], [1, 2]]


@pytest.mark.parametrize("projector", ["svd", "power"])
@pytest.mark.parametrize(("share", "rank"), [(0.7, 2), (0.89, 2), (0.95, 3), (0.985, 4)])
def test_a_known_spectrum_gets_the_rank_it_needs(projector, share, rank):
    """Energies of 64, 25, 9, 1 and 1 parts of 100: sums of 64, 89, 98, 99."""
    share -= 1e-6
    param = torch.nn.Parameter(torch.zeros(13, 5, dtype=torch.float64))
    auto = AutoRank(share, 0.2, 1.0)
    optimizer = GaLoreAdamW([param], rank=auto, min_dim=1, projector=projector)
    param.grad = of_spectrum([8.0, 5.0, 3.0, 1.0, 1.0])
    optimizer.step()
    assert rank_of(optimizer, param) == rank


def test_share_one_is_full_rank():
    param = torch.nn.Parameter(torch.zeros(13, 7, dtype=torch.float64))
    optimizer = LowRank(
        [param], rank=AutoRank(1.0, 0.2, 1.0), min_dim=1, rule="sgdm", lr=1.0, weight_decay=0
    )
    grad = param.grad = torch.randn_like(param)
    optimizer.step()
    assert rank_of(optimizer, param) == 7
    torch.testing.assert_close(param.detach(), -grad, rtol=0, atol=1e-12)


@each
def test_ranks_change_and_a_resumed_run_is_the_same_to_the_bit(make):
    model, ranks = Model(), set()
    optimizer = make(model.parameters())
    checkpoints = {}
    for step in range(4 * GAP):
        if step in (1, GAP, 2 * GAP + 1, 3 * GAP - 1):
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], file)
            checkpoints[step] = file
        train(model, optimizer, range(step, step + 1))
        ranks.add(tuple(rank_of(optimizer, getattr(model, name)) for name in ("tall", "wide")))
        assert predicted_bytes(optimizer) == state_bytes(optimizer)
    assert len(ranks) > 1
    for step, file in checkpoints.items():
        file.seek(0)
        weights_then, state = torch.load(file, weights_only=True)
        resumed = Model()
        resumed.load_state_dict(weights_then)
        other = make(resumed.parameters())
        other.load_state_dict(state)
        train(resumed, other, range(step, 4 * GAP))
        assert_same(weights(resumed), weights(model))


def test_groups_of_a_model_take_it_as_the_optimizer_does():
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.LayerNorm(40))
    groups = param_groups(model, rank="auto", min_dim=1, lr=1e-2, rest_lr=1e-3)
    assert groups[0]["param_names"] == ["0.weight"]
    optimizer = GaLoreAdamW(groups, projector="power", state_budget="30KiB")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert 2 <= rank_of(optimizer, model[0].weight) <= 10
    assert rank_asked(optimizer.param_groups[0]) == AutoRank()


def test_moments_are_carried_into_a_subspace_of_another_rank():
    """M' = b1 M P^T P' + (1 - b1) G P', whether the rank rises or falls."""
    param = torch.nn.Parameter(torch.zeros(13, 7, dtype=torch.float64))
    auto = AutoRank(0.97, 0.2, 1.0)
    optimizer = GaLoreAdamW([param], rank=auto, min_dim=1, update_proj_gap=1, on_refresh="rotate")
    seen = []
    for kept in (2, 6, 3):
        spectrum = [10.0] * kept + [0.1] * (7 - kept)
        state = optimizer.state[param]
        before = {key: state[key].clone() for key in ("basis", "exp_avg") if key in state}
        param.grad = of_spectrum(spectrum)
        optimizer.step()
        state = optimizer.state[param]
        seen.append(rank_of(optimizer, param))
        wanted = 0.1 * param.grad @ state["basis"]
        if before:
            wanted += 0.9 * before["exp_avg"] @ before["basis"].mT @ state["basis"]
        torch.testing.assert_close(state["exp_avg"], wanted, rtol=0, atol=1e-12)
        assert state["exp_avg_sq"].shape == (13, seen[-1])
        assert state["exp_avg_sq"].min() >= 0
    assert seen == [2, 6, 3]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_says_nothing_keeps_rank_and_subspace(bad):
    param = torch.nn.Parameter(torch.zeros(13, 7))
    optimizer = GaLoreAdamW([param], rank=AutoRank(0.9, 0.2, 1.0), min_dim=1, update_proj_gap=1)
    param.grad = torch.randn(13, 7)
    optimizer.step()
    basis = optimizer.state[param]["basis"].clone()
    param.grad = torch.full((13, 7), bad)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["basis"], basis)
    assert 2 <= basis.shape[-1] < 7


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_the_state_stays_within_the_budget_and_uses_it(state_dtype):
    shapes = [(40, 30), (30, 70), (4, 24, 30)]
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    frozen = torch.nn.Parameter(torch.zeros(500, 400), requires_grad=False)
    common = {"update_proj_gap": 2, "projector": "power", "state_dtype": state_dtype}
    auto = AutoRank(0.999, 0.1, 1.0)
    free = GaLoreAdamW(params, rank=auto, min_dim=1, **common)
    budget = predicted_bytes(free) // 2
    optimizer = GaLoreAdamW([*params, frozen], rank=auto, min_dim=1, state_budget=budget, **common)
    assert 0.9 * budget < predicted_bytes(optimizer) <= budget
    for _ in range(5):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        assert 0.9 * budget < state_bytes(optimizer) <= budget
    ranks = [rank_of(optimizer, param) for param in params]
    assert f" {min(ranks)}-{max(ranks)} " in optimizer.summary()
    with pytest.raises(ValueError, match=r"state_budget=100: the least ranks take \d+ bytes"):
        GaLoreAdamW(params, rank=auto, min_dim=1, state_budget=100, **common).summary()


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(9, 64)), min_size=1, max_size=5), st.data()
)
@settings(deadline=None)
def test_within_is_as_large_as_the_budget_allows(bounds, data):
    cols = [high for _, high in bounds]
    budget = data.draw(st.integers(sum(low for low, _ in bounds), sum(cols) + 9))
    ranks = within(bounds, cols, sum, budget)
    assert sum(ranks) <= budget
    assert all(low <= rank <= high for rank, (low, high) in zip(ranks, bounds, strict=True))
    if budget >= sum(cols):
        assert ranks == cols


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10KB", 10**4), ("2g", 2 << 30), ("512 B", 512)],
)
def test_bytes_are_read(text, size):
    assert bytes_in(text) == size
    parameter = torch.nn.Parameter(torch.zeros(6, 5))
    for budget in (text, size):
        (group,) = LowRank([parameter], rank="auto", state_budget=budget).param_groups
        assert group["state_budget"] == size


@pytest.mark.parametrize("text", ["GiB", "2 lots", "2XB", "-1GiB", "512"])
def test_what_is_no_number_of_bytes_is_none(text):
    assert bytes_in(text) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": "auto", "projector": "random"}, "does not go with the projector Random"),
        ({"rank": "auto", "on_refresh": "align"}, 'does not go with on_refresh="align"'),
        ({"rank": 3, "state_budget": "1MiB"}, 'belongs to rank="auto"'),
        ({"rank": "auto", "state_budget": "lots"}, "state_budget='lots': state_budget must be"),
        ({"rank": "automatic"}, '"auto" or an AutoRank'),
    ],
)
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        LowRank([torch.nn.Parameter(torch.zeros(6, 5))], **changes)


@pytest.mark.parametrize("bad", [{"share": 0}, {"least": 1.5}, {"least": 0.6, "most": 0.5}])
def test_bounds_are_checked(bad):
    with pytest.raises(ValueError, match=r"must be a number in|is more than"):
        AutoRank(**bad)


def test_a_checkpoint_says_what_it_was_made_with_and_fits_no_fixed_rank():
    model = Model()
    optimizer = MAKES["svd"](model.parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert rank_asked(saved["param_groups"][0]) == AUTO
    with pytest.raises(ValueError, match="rank"):
        GaLoreAdamW(Model().parameters(), rank=3, on_refresh="rotate").load_state_dict(saved)
    fixed = GaLoreAdamW(model.parameters(), rank=3, on_refresh="rotate", update_proj_gap=GAP)
    train(model, fixed, range(2))
    with pytest.raises(ValueError, match="rank 3 in the checkpoint, auto here"):
        optimizer.load_state_dict(fixed.state_dict())


@pytest.mark.parametrize("side", ["auto", "left", "right", "reverse"])
@pytest.mark.parametrize("shape", [(1, 11), (11, 1), (2, 11), (11, 2), (3, 1, 11), (3, 11, 1)])
@pytest.mark.parametrize("name", ["svd", "power", "dct", "reset", "trion", "feedback"])
def test_matrices_of_one_or_two_rows_step_whatever_the_least_rank(name, shape, side):
    """A subspace has no more directions than rows, and the least rank may ask for more."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape))
    other = torch.nn.Parameter(torch.randn(13, 7))
    optimizer = MAKES[name]([{"params": [other]}, {"params": [param], "side": side}])
    for _ in range(GAP + 2):
        for each_of in (param, other):
            each_of.grad = torch.randn_like(each_of)
        before = param.detach().clone()
        optimizer.step()
        assert param.isfinite().all()
        assert not torch.equal(param, before)
        assert predicted_bytes(optimizer) == state_bytes(optimizer)
