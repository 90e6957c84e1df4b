"""Who does a step and who codes moments are two questions; the identity costs no copy."""

import pytest
import torch
from torch import nn

from helpers.cases import Model, assert_same, train, weights
from lowrank_optim import DCTAdamW, LowRank, MuonW, kernels
from lowrank_optim.engine import backend
from lowrank_optim.engine.backend import LAUNCHES, missing
from lowrank_optim.functional import UNIT, down, drop_, lift_
from lowrank_optim.settings.plans import plan_of

CODED = {
    "muon": lambda params, **more: MuonW(params, state_dtype="8bit", **more),
    "lion": lambda params, **more: LowRank(params, rank=3, rule="lion", state_dtype="8bit", **more),
    "sgdm": lambda params, **more: LowRank(params, rank=3, rule="sgdm", state_dtype="8bit", **more),
    "lion-dct": lambda params, **more: LowRank(
        params, rank=3, rule="lion", projector="dct", update_proj_gap=1, **more
    ),
}


@pytest.fixture
def counted(monkeypatch):
    """Calls of the kernels that code moments or score columns."""
    calls = []
    for name in ("quantize_blockwise", "dequantize_blockwise", "dct_scores"):
        kernel = getattr(kernels, name)

        def counting(*arguments, name=name, kernel=kernel):
            calls.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(kernels, name, counting)
    return calls


@pytest.mark.parametrize("name", CODED)
def test_codecs_are_kernels_where_the_step_is_plain_torch(name, counted, monkeypatch):
    """As on a GPU, where no launch steps by these rules."""
    monkeypatch.setattr(backend, "refusal", lambda *_: "no launches in this test")
    found = []
    for impl in ("eager", "triton"):
        counted.clear()
        model = Model()
        optimizer = CODED[name](model.parameters(), impl=impl, lr=1e-2)
        train(model, optimizer, range(3))
        found.append((weights(model), len(counted)))
    assert_same(found[0][0], found[1][0])
    assert (found[0][1], found[1][1] > 0) == (0, True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CODED)
def test_codecs_are_kernels_on_a_gpu(name, counted):
    model = Model().cuda()
    optimizer = CODED[name](model.parameters(), lr=1e-2)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert counted


def test_every_kernel_of_the_table_exists():
    for names in LAUNCHES.values():
        assert all(callable(getattr(kernels, name)) for name in names)


@pytest.mark.parametrize(
    ("settings", "lacks"),
    [
        ({}, None),
        ({"state_dtype": "8bit"}, None),
        ({"rule": "lion"}, "the rule Lion"),
        ({"rule": "lion", "feed": "error_feedback"}, "the rule Lion"),
        ({"feed": "error_feedback"}, "the feed ErrorFeedback"),
        ({"projector": "identity", "rank": 1.0}, "the projector Identity"),
    ],
)
def test_what_lacks_a_kernel_is_named(settings, lacks):
    group = LowRank([nn.Parameter(torch.zeros(9, 7))], **{"rank": 3, **settings}).param_groups[0]
    reason = missing(plan_of(group), True)
    assert reason == (lacks and f"no kernel for {lacks}")
    assert (missing(plan_of(group), False) is None) == (settings.get("rule") != "lion")


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 5, 9)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_identity_is_all_columns(shape, transposed):
    torch.manual_seed(0)
    grad, low = torch.randn(shape), torch.randn(shape)
    grad, low = (grad.mT, low.mT) if transposed else (grad, low)
    columns = torch.arange(grad.shape[-1])
    assert torch.equal(down(grad, UNIT, torch.float32), down(grad, columns, torch.float32))
    ends = [grad.clone(), grad.clone()]
    for out, factor in zip(ends, (UNIT, columns), strict=True):
        lift_(out, low, factor, keep=0.9, scale=-0.3)
    assert torch.equal(*ends)
    assert not drop_(grad.clone(), down(grad, UNIT, torch.float32), UNIT).any()


def test_a_gradient_in_the_dtype_of_the_arithmetic_is_its_own_projection():
    grad = torch.randn(5, 9)
    assert down(grad, UNIT, torch.float32) is grad
    assert down(grad.half(), UNIT, torch.float32).dtype == torch.float32


def test_a_subspace_of_dct_is_scored_by_kernels(counted):
    model = nn.Linear(32, 24, bias=False)
    optimizer = DCTAdamW(model.parameters(), rank=5, update_proj_gap=1, impl="triton", lr=1e-2)
    model.weight.grad = torch.randn(24, 32)
    optimizer.step()
    assert "dct_scores" in counted
