"""What happens in real loops: late gradients, half precision, scalers, distributed checkpoints."""

from __future__ import annotations

import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from helpers.cases import CASES, GAP, RANK, Model, assert_same, gradient, train, weights
from helpers.pairwise import in_turn
from lowrank_optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, LowRank
from lowrank_optim.engine.sites import sites_of
from lowrank_optim.parts.types import Shared
from lowrank_optim.settings.plans import plan_of

each_case = pytest.mark.parametrize("case", CASES, ids=str)
LEARNED = ["svd", "power", "dct"]


def captured(optimizer, param, grad):
    """Return the share of a gradient's energy that each matrix's subspace holds."""
    group = optimizer.param_groups[0]
    plan = plan_of(group)
    site = next(site for p, site in sites_of(group, plan, Shared()) if p is param)
    basis = plan.projector.basis(optimizer.state[param], site)
    return (grad @ basis).square().sum((-2, -1)) / grad.square().sum((-2, -1))


def low_rank(shape, seed):
    rng = torch.Generator().manual_seed(seed)
    left = torch.randn(*shape[:-1], 3, generator=rng)
    return left @ torch.randn(*shape[:-2], 3, shape[-1], generator=rng)


@pytest.mark.parametrize("projector", ["svd", "power"])
@pytest.mark.parametrize("on_refresh", ["keep", "reset", "rotate", "align"])
def test_a_first_gradient_of_zero_does_not_pin_the_subspace(projector, on_refresh):
    """Zero-initialised layers: after 1, 2, 4, 8, ... updates it is looked for again."""
    param = torch.nn.Parameter(torch.zeros(20, 12))
    optimizer = LowRank([param], rank=4, projector=projector, on_refresh=on_refresh)
    for step in range(5):
        param.grad = torch.zeros_like(param) if step < 3 else low_rank(param.shape, 0)
        optimizer.step()
        assert optimizer.state_dict()["state"][0]["pending"] == (step < 4)
    assert captured(optimizer, param, param.grad) > 0.999
    before = optimizer.state[param]["basis"].clone()
    param.grad = low_rank(param.shape, 1)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["basis"], before)


@pytest.mark.parametrize("projector", LEARNED)
def test_experts_without_tokens_get_their_subspace_when_they_have_one(projector):
    stack = torch.nn.Parameter(torch.zeros(3, 20, 12))
    optimizer = LowRank([stack], rank=4, projector=projector)
    kept = None
    for step in range(6):
        stack.grad = low_rank(stack.shape, 0)
        stack.grad[1] *= step >= 2
        stack.grad[2] *= step >= 4
        optimizer.step()
        assert optimizer.state_dict()["state"][0]["pending"] == (step < 4)
        state = optimizer.state[stack]
        chosen = state["index" if projector == "dct" else "basis"]
        assert kept is None or torch.equal(chosen[0], kept)
        kept = chosen[0].clone()
    if projector != "dct":
        assert (captured(optimizer, stack, stack.grad) > 0.999).all()
    fresh = LowRank([stack], rank=4, projector=projector)
    fresh.step()
    torch.testing.assert_close(
        captured(optimizer, stack, stack.grad), captured(fresh, stack, stack.grad)
    )


def test_second_moments_in_bfloat16_fall_when_gradients_do():
    """Rounded to nearest, 0.999 v is v: the moments would never fall."""
    param = torch.nn.Parameter(torch.zeros(64, 48))
    optimizer = GaLoreAdamW([param], rank=8, projector="columns", state_dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    for size, steps in ((1.0, 500), (0.01, 1500)):
        for _ in range(steps):
            param.grad = size * torch.randn(64, 48, generator=rng)
            optimizer.step()
        mean = float(optimizer.state[param]["exp_avg_sq"].float().mean())
        if size == 1.0:
            high = mean
    assert high == pytest.approx(1 - 0.999**500, rel=0.05)
    assert mean == pytest.approx(high * 0.999**1500, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*projects none of its:UserWarning")
@pytest.mark.parametrize("rank", [4, 100])
def test_stochastic_rounding_lets_small_updates_count(rank):
    """bf16 weights near 1 with steps of 1e-5: lost to nearest rounding, kept on average here."""
    moved = {}
    for rounding in (False, True):
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        twin = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = FrugalAdamW(
            [param, twin], lr=1e-5, rank=rank, weight_decay=0.0, stochastic_rounding=rounding
        )
        for _ in range(100):
            param.grad, twin.grad = torch.ones_like(param), torch.ones_like(twin)
            optimizer.step()
        moved[rounding] = float((1 - param.detach().float()).mean())
        assert torch.equal(param, twin) != rounding
    assert moved[False] == 0
    assert moved[True] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("preset", [ApolloAdamW, FrugalAdamW])
def test_the_seed_decides_the_draws(preset):
    results = []
    for seed in (0, 0, 1):
        model = Model()
        train(model, preset(model.parameters(), rank=RANK, seed=seed), range(2))
        results.append(model.tall.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maximize_is_descent_on_the_negative(case, dtype):
    """Plain parameters, sign terms and every rule included; for bf16, to one rounding a step."""
    down, up = Model(dtype), Model(dtype)
    flip = not case.settings.get("maximize", False)
    down_optimizer = case.build(down.parameters())
    up_optimizer = case.build(up.parameters(), maximize=flip)
    for step in range(GAP + 2):
        for position, (one, other) in enumerate(
            zip(down.parameters(), up.parameters(), strict=True)
        ):
            one.grad = gradient(one, step, position)
            other.grad = -one.grad
        down_optimizer.step()
        up_optimizer.step()
    exact = dtype == torch.float64 and not case.coarse
    for name, param in down.named_parameters():
        other = getattr(up, name)
        torch.testing.assert_close(param, other, rtol=0, atol=1e-9 if exact else 0.05, msg=name)


@pytest.mark.parametrize(
    ("share", "axis", "rank"),
    [(0.25, 7, 2), (0.25, 9, 2), (0.01, 50, 1), (0.5, 5, 2), (0.9, 10, 9)],
)
def test_a_share_is_rounded_to_columns(share, axis, rank):
    param = torch.nn.Parameter(torch.zeros(60, axis))
    optimizer = GaLoreAdamW([param], rank=share, min_dim=1)
    param.grad = torch.randn(60, axis)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].shape == (60, rank)


@pytest.mark.parametrize("bad", range(4))
@pytest.mark.parametrize("watched", [(True, True), (True, False), (False, True)])
def test_skip_nonfinite_looks_at_every_gradient_of_its_groups(bad, watched):
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(4)]
    optimizer = GaLoreAdamW(
        [
            {"params": params[:2], "skip_nonfinite": watched[0]},
            {"params": params[2:], "skip_nonfinite": watched[1]},
        ],
        rank=2,
    )
    for place, param in enumerate(params):
        param.grad = torch.randn(8, 6)
        if place == bad:
            param.grad[7, 5] = float("nan")
    optimizer.step()
    skipped = watched[bad // 2]
    assert optimizer.skipped_steps == skipped
    assert bool(optimizer.state) != skipped
    assert all(torch.equal(param, torch.ones(8, 6)) == skipped for param in params)


@each_case
def test_rehearsal_with_a_tensor_as_rate(case):
    """Distributed checkpointing sets `torch.tensor(0.0)` where lr is a tensor."""
    rehearsed, plain = Model(), Model()
    rate = case.settings.get("lr", 1e-2)
    optimizer = case.build(rehearsed.parameters(), lr=torch.tensor(rate))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    for param in rehearsed.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert len(optimizer.state) == len(list(rehearsed.parameters()))
    optimizer.param_groups[0]["lr"] = torch.tensor(rate)
    train(rehearsed, optimizer, range(GAP + 2))
    train(plain, case.build(plain.parameters(), lr=torch.tensor(rate)), range(GAP + 2))
    assert_same(weights(rehearsed), weights(plain))


def test_warm_up_from_a_rate_of_zero_is_a_real_step():
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW([param], lr=0.0, rank=2)
    param.grad = torch.randn(8, 6)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1
    assert optimizer.state[param]["exp_avg"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_convolutions_are_written_back(dtype):
    straight = torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(dtype))
    other = torch.nn.Parameter(straight.detach().to(memory_format=torch.channels_last))
    assert not other.is_contiguous()
    for param in (straight, other):
        optimizer = FiraAdamW([param], lr=0.1, rank=2)
        for step in range(3):
            param.grad = gradient(param, step, 0)
            optimizer.step()
    torch.testing.assert_close(straight, other)


@pytest.mark.parametrize(
    ("case", "flat", "stop"),
    in_turn(
        CASES, (False, 0), (True, GAP), (False, GAP + 1), (True, 0), (False, GAP), (True, GAP + 1),
        every=[CASES[1]],
    ),
    ids=str,
)  # fmt: skip
def test_distributed_checkpoint_state_dicts_resume_bit_identically(case, flat, stop):
    """`get/set_optimizer_state_dict`, which take an initial step of their own, on bf16 weights."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    whole, resumed = Model(torch.bfloat16), Model(torch.bfloat16)
    optimizer = case.build(whole.named_parameters())
    train(whole, optimizer, range(stop))
    for param in whole.parameters():
        param.grad = None
    file = io.BytesIO()
    torch.save(get_optimizer_state_dict(whole, optimizer, options=options), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(whole.state_dict())
    other = case.build(resumed.named_parameters())
    set_optimizer_state_dict(resumed, other, saved, options=options)
    train(whole, optimizer, range(stop, 3 * GAP))
    train(resumed, other, range(stop, 3 * GAP))
    assert_same(weights(resumed), weights(whole))


@each_case
def test_a_step_that_the_scaler_skips_leaves_no_trace(case):
    skipping, plain = Model(), Model()
    optimizer, other = case.build(skipping.parameters()), case.build(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for step in range(GAP + 2):
        for bad in (True, False):
            for position, param in enumerate(skipping.parameters()):
                param.grad = scaler.get_scale() * gradient(param, step, position)
            if bad:
                skipping.wide.grad[2, 3] = float("inf")
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
        train(plain, other, range(step, step + 1))
    assert_same(weights(skipping), weights(plain))


@each_case
def test_autocast_does_not_change_the_step(case):
    inside, outside = Model(), Model()
    optimizer, other = case.build(inside.parameters()), case.build(outside.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(inside, optimizer, range(GAP + 2))
    train(outside, other, range(GAP + 2))
    assert_same(weights(inside), weights(outside))


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason="this torch has no grad_dtype: a gradient has the dtype of its parameter",
)
def test_gradients_of_another_dtype_than_the_parameter():
    """bf16 gradients of float32 weights and the reverse, projected and plain."""
    for weight, grad in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        for shape in ((8, 6), (6,)):
            param = torch.nn.Parameter(torch.ones(shape, dtype=weight))
            matrix = torch.nn.Parameter(torch.ones(8, 6))
            matrix.grad = torch.ones(8, 6)
            param.grad_dtype = None
            param.grad = torch.ones(shape, dtype=grad)
            GaLoreAdamW([matrix, param], lr=0.1, rank=2, scale=1.0).step()
            assert param.isfinite().all()
            assert param.float().mean() < 0.999
