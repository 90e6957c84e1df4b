"""What is not projected is torch.optim.AdamW, to the bit."""

from __future__ import annotations

import pytest
import torch

from helpers.cases import FULL, PRESETS, Model, assert_same, train, weights
from lowrank_optim import GaLoreAdamW, LowRank

pytestmark = pytest.mark.filterwarnings("ignore:.*projects none of its:UserWarning")
WAYS = {
    "no rank in the group": lambda model: [
        {"params": [torch.nn.Parameter(torch.ones(3, 4))], "rank": 2},
        {"params": list(model.parameters()), "rank": None},
    ],
    "rank too large": lambda model: [{"params": list(model.parameters()), "rank": 18}],
    "the whole axis": lambda model: [{"params": list(model.parameters()), "rank": 1.0}],
}


@pytest.mark.parametrize(
    ("preset", "way"),
    [
        (preset, way)
        for preset in (*PRESETS, LowRank)
        for way in WAYS
        if preset not in FULL or way == "no rank in the group"
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_not_projected_is_adamw_over_a_schedule(preset, way, dtype, flags):
    settings = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.2}
    ours, theirs = Model(dtype), Model(dtype)
    optimizer = preset([{**group, **flags} for group in WAYS[way](ours)], **settings)
    adamw = torch.optim.AdamW(theirs.parameters(), **settings, **flags)
    for optim, model in ((optimizer, ours), (adamw, theirs)):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optim, max_lr=1e-2, total_steps=12)
        for step in range(9):
            train(model, optim, range(step, step + 1))
            schedule.step()
    assert_same(weights(ours), weights(theirs))
    assert not torch.equal(ours.tall, Model(dtype).tall)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [3e-3, torch.tensor(3e-3), torch.tensor([3e-3])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_lr_and_maximize(maximize, lr, dtype):
    if isinstance(lr, torch.Tensor) and lr.ndim and torch.__version__ < "2.9":
        lr = lr.reshape(())
    ours, theirs = Model(dtype), Model(dtype)
    optimizer = GaLoreAdamW(ours.parameters(), lr, rank=50, maximize=maximize)
    adamw = torch.optim.AdamW(theirs.parameters(), lr, maximize=maximize)
    for step in range(5):
        for optim, model in ((optimizer, ours), (adamw, theirs)):
            if isinstance(lr, torch.Tensor):
                optim.param_groups[0]["lr"].fill_(1e-3 * (step + 1))
            train(model, optim, range(step, step + 1))
    assert_same(weights(ours), weights(theirs))


def test_half_precision_parameters_get_float32_moments():
    """bf16 weights follow float32 AdamW: one rounding a step, of the weight alone."""
    start = torch.randn(6, 5).bfloat16()
    ours = torch.nn.Parameter(start.clone())
    twin = torch.nn.Parameter(start.float())
    optimizer = GaLoreAdamW([ours], lr=1e-2, rank=50)
    adamw = torch.optim.AdamW([twin], lr=1e-2)
    for _ in range(10):
        ours.grad = torch.randn(6, 5).bfloat16()
        twin.grad = ours.grad.float()
        optimizer.step()
        adamw.step()
        assert torch.equal(ours.detach(), twin.detach().bfloat16())
        twin.data.copy_(ours.detach().float())
    assert optimizer.state[ours]["exp_avg"].dtype == torch.float32


def test_checkpoint_of_torch_adamw_can_be_continued():
    ours, theirs = Model(), Model()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    train(theirs, adamw, range(3))
    ours.load_state_dict(theirs.state_dict())
    optimizer = GaLoreAdamW(ours.parameters(), lr=1e-2, rank=50)
    optimizer.load_state_dict(adamw.state_dict())
    train(theirs, adamw, range(3, 6))
    train(ours, optimizer, range(3, 6))
    assert_same(weights(ours), weights(theirs))


def test_nothing_projected_is_said_once():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=50)
    with pytest.warns(UserWarning, match="projects none of its 9 parameter tensors") as caught:
        train(model, optimizer, range(3))
    assert len(caught) == 1
