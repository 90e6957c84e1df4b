"""Updates inside the backward pass: the same results, the same state, gradients freed."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from helpers.cases import CASES, Model, assert_same, weights
from helpers.layerwise import STEPS, assert_same_state, loss_of, pair, run
from helpers.pairwise import in_turn
from lowrank_optim import GaLoreAdamW

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize(
    ("case", "dtype"), in_turn(CASES, torch.float32, torch.bfloat16, every=CASES[:2]), ids=str
)
def test_results_and_state_are_those_of_step(case, dtype):
    (model, ordinary), (other, layerwise) = pair(case, dtype)
    run(model, ordinary)
    run(other, layerwise)
    assert_same(weights(model), weights(other))
    assert_same_state(ordinary, layerwise)


@pytest.mark.parametrize("projector", ["svd", "power", "dct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_one_shape_that_step_refreshes_together(projector, dtype):
    """Alone in the backward pass, in company in step(): the same bits."""
    results = []
    for layerwise in (False, True):
        rng = torch.Generator().manual_seed(0)
        model = nn.ParameterList(
            torch.randn(size, 48, dtype=dtype, generator=rng) for size in (65, 65, 48, 65, 65)
        )
        optimizer = GaLoreAdamW(
            model, lr=1e-2, rank=3, projector=projector, update_proj_gap=2, stagger=False
        )
        if layerwise:
            optimizer.step_in_backward()
        run(model, optimizer, range(5))
        results.append(weights(model))
    assert_same(*results)


@each_case
def test_a_run_changes_between_the_modes_at_any_step(case):
    (model, ordinary), (other, layerwise) = pair(case)
    run(model, ordinary)
    run(other, layerwise, range(3))
    third = Model(seed=5)
    third.load_state_dict(other.state_dict())
    resumed = case.build(third.named_parameters())
    resumed.load_state_dict(layerwise.state_dict())
    run(third, resumed, range(3, 6))
    handle = resumed.step_in_backward()
    run(third, resumed, range(6, 8))
    handle.remove()
    run(third, resumed, range(8, STEPS))
    assert_same(weights(model), weights(third))
    assert_same_state(ordinary, resumed)


def test_gradients_are_freed_as_they_are_used():
    layers = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(6)))
    grads, live = [], []

    def watch(param):
        grads.append(weakref.ref(param.grad))
        live.append(sum(grad() is not None for grad in grads))

    for param in layers.parameters():
        param.register_post_accumulate_grad_hook(watch)
    optimizer = GaLoreAdamW(layers.parameters(), rank=3)
    optimizer.step_in_backward()
    for _ in range(2):
        layers(torch.randn(4, 12)).square().sum().backward()
        assert all(param.grad is None for param in layers.parameters())
        optimizer.step()
    assert live == [1] * 12


@each_case
def test_step_param_is_step(case):
    """As kohya's and OneTrainer's fused backward passes call it, without any step()."""
    models = [Model() for _ in range(3)]
    ordinary, kohya, onetrainer = (case.build(model.named_parameters()) for model in models)

    def hook(param):
        kohya.step_param(param, kohya.param_groups[0])
        param.grad = None

    for param in models[1].parameters():
        param.register_post_accumulate_grad_hook(hook)
    for step in range(STEPS):
        for model in models:
            loss_of(model, step).backward()
        ordinary.step()
        ordinary.zero_grad()
        for i, param in enumerate(models[2].parameters()):
            onetrainer.step_parameter(param, onetrainer.param_groups[0], i)
            param.grad = None
    for model, optimizer in ((models[1], kohya), (models[2], onetrainer)):
        assert_same(weights(models[0]), weights(model))
        assert_same_state(ordinary, optimizer)


def test_the_init_step_of_checkpoints_changes_nothing():
    (model, _), (other, layerwise) = pair(CASES[0])
    untouched = CASES[0].build(model.named_parameters())
    get_optimizer_state_dict(other, layerwise)
    assert layerwise.state[other.tall]["step"] == 0
    run(model, untouched)
    run(other, layerwise)
    assert_same(weights(model), weights(other))


def test_schedulers_and_step_hooks_work_as_they_are():
    results = []
    for layerwise in (False, True):
        model = Model()
        optimizer = CASES[0].build(model.parameters())
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
        if layerwise:
            optimizer.step_in_backward()
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
        assert len(calls) == STEPS
        results.append(weights(model))
    assert_same(*results)


def test_a_closure_may_do_the_backward_pass():
    (model, ordinary), (other, layerwise) = pair(CASES[0])
    for step in range(STEPS):
        for net, optimizer in ((model, ordinary), (other, layerwise)):

            def closure(net=net, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same(weights(model), weights(other))


def test_tied_weights_and_checkpointed_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(20, 12)
            self.block = nn.Linear(12, 12)

        def forward(self, tokens):
            hidden = self.embed(tokens)
            for _ in range(2):
                hidden = hidden + torch.utils.checkpoint.checkpoint(
                    self.block, hidden, use_reentrant=False
                )
            return hidden @ self.embed.weight.T

    results = []
    for layerwise in (False, True):
        model = Tied()
        optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, rank=4)
        if layerwise:
            optimizer.step_in_backward()
        for step in range(4):
            tokens = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(step))
            model(tokens).log_softmax(-1)[..., 0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    assert_same(*results)


def test_parameters_late_frozen_swapped_and_without_gradient():
    """All that ordinary steps allow: what has no hook yet is done by step()."""
    results = []
    for layerwise in (False, True):
        model = Model()
        model.wide.requires_grad_(False)
        optimizer = CASES[0].build([model.tall, model.wide, model.square])
        if layerwise:
            optimizer.step_in_backward()
        for step in range(STEPS):
            if step == 2:
                optimizer.add_param_group({"params": [model.stack, model.vector]})
            if step == 4:
                model.wide.requires_grad_(True)
            if step == 6:
                model.tall = nn.Parameter(model.tall.detach().clone())
                old = optimizer.param_groups[0]["params"][0]
                optimizer.state[model.tall] = optimizer.state.pop(old)
                optimizer.param_groups[0]["params"][0] = model.tall
            if step != 3:
                loss_of(model, step).backward()
            optimizer.step()
            model.zero_grad()
        results.append(weights(model))
    assert_same(*results)
