"""Updates inside the backward pass: the same results, the same state, gradients freed."""

from __future__ import annotations

import gc
import re
import weakref
from copy import deepcopy

import pytest
import torch
from cases import CASES, GAP, RANK, Model, assert_same, gradient, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lowrank_optim import DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, LowRank

each_case = pytest.mark.parametrize("case", CASES, ids=str)
STEPS = 2 * GAP + 2


def loss_of(model, step, scale=1.0):
    """A loss whose gradients are those of `cases.gradient`, times `scale`."""
    losses = [
        (param * gradient(param, step, position)).sum() * scale
        for position, param in enumerate(model.parameters())
        if param.requires_grad
    ]
    return torch.stack([loss.float() for loss in losses]).sum()


def run(model, optimizer, steps=range(STEPS), passes=1):
    """Train in a plain loop; with several passes a step, each has gradients of its own."""
    for step in steps:
        for number in range(passes):
            loss_of(model, step + 100 * number).backward()
        optimizer.step()
        optimizer.zero_grad()


def pair(case, dtype=torch.float32, **settings):
    """Two equal models with optimizers; the second steps in the backward pass."""
    models = [Model(dtype), Model(dtype)]
    optimizers = [case.build(model.named_parameters()) for model in models]
    optimizers[1].step_in_backward(**settings)
    return (*zip(models, optimizers, strict=True),)


def assert_same_state(left, right):
    """Assert that two optimizers hold the same state and settings, to the bit."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state.keys() == theirs["state"][key].keys()
        for name, value in state.items():
            other = theirs["state"][key][name]
            equal = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert equal, name
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        of_torch = {"differentiable": False, "grad_norm": None}  # set by loading; by the mode
        assert {**group, **of_torch} == {**other, **of_torch}


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


@pytest.mark.parametrize("mode", ["ordinary", "in backward", "full", "projected"])
def test_memory_of_gradients_is_what_is_documented(mode):
    """Bytes of gradients and of their projected sums at the worst moment of a step."""
    rank, width, depth, head = 5, 24, 4, 31
    model = nn.Sequential(
        *(nn.Linear(width, width, bias=False) for _ in range(depth)),
        nn.Linear(width, head, bias=False),
    )
    matrices = list(model.parameters())[:depth]
    optimizer = GaLoreAdamW(
        [{"params": matrices, "rank": rank}, {"params": model[-1].parameters()}]
    )
    peak = 0

    def watch(_):
        nonlocal peak
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        sums = optimizer._in_backward._sums.values() if optimizer._in_backward else ()
        peak = max(peak, sum(x.numel() * x.element_size() for x in (*grads, *sums)))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(watch)
    passes = 1 if mode == "in backward" else 3
    if mode != "ordinary":
        accumulate = "full" if mode == "in backward" else mode
        optimizer.step_in_backward(accumulation_steps=passes, accumulate=accumulate)
    for number in range(2 * passes):
        model(torch.randn(3, width)).square().sum().backward()
        if number % passes == passes - 1:
            optimizer.step()
            optimizer.zero_grad()
    matrix, last = 4 * width * width, 4 * width * head
    assert (
        peak
        == {
            "ordinary": depth * matrix + last,
            "in backward": max(matrix, last),
            "full": depth * matrix + last,
            "projected": depth * 4 * width * rank + last + matrix,
        }[mode]
    )


@pytest.mark.parametrize("said", ["number", "function"])
@each_case
def test_whole_gradients_accumulate_as_without(case, said):
    number = 0

    def last():
        return number == 2

    (model, ordinary), (other, layerwise) = pair(
        case, accumulation_steps=3 if said == "number" else last
    )
    run(model, ordinary, passes=3)
    for step in range(STEPS):
        for number in range(3):
            loss_of(other, step + 100 * number).backward()
            freed = all(param.grad is None for param in other.parameters())
            assert freed == (number == 2)
        layerwise.step()
    assert_same(weights(model), weights(other))
    assert_same_state(ordinary, layerwise)


def test_a_step_after_fewer_passes_uses_what_there_is():
    """The last batches of an epoch may be fewer: step() does what the backward pass did not."""
    for accumulate in ("full", "projected"):
        (model, ordinary), (other, layerwise) = pair(
            CASES[0], accumulation_steps=3, accumulate=accumulate
        )
        passes = 2 if accumulate == "full" else 1
        run(model, ordinary, passes=passes)
        run(other, layerwise, passes=passes)
        close = {"rtol": 0, "atol": 0 if accumulate == "full" else 1e-5}
        for name, value in weights(model).items():
            torch.testing.assert_close(weights(other)[name], value, **close)
        assert layerwise.state[other.tall]["step"] == STEPS


DROPPING = [
    (LowRank, {"projector": "random"}),
    (LowRank, {"projector": "columns", "on_refresh": "reset"}),
    (FrugalAdamW, {"state_free": "none"}),
    (LowRank, {"projector": "random", "rule": "lion"}),
]


@pytest.mark.parametrize(("factory", "settings"), DROPPING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projected_gradients_accumulate_to_rounding(factory, settings, dtype):
    """Where the subspace does not come from the gradient, to rounding and at refreshes too."""
    results = []
    for layerwise in (False, True):
        model = Model(dtype)
        optimizer = factory(model.parameters(), lr=1e-3, rank=RANK, update_proj_gap=3, **settings)
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=3, accumulate="projected")
        run(model, optimizer, passes=3)
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factory", [GaLoreAdamW, DCTAdamW])
@pytest.mark.parametrize("projector", ["svd", "power", "dct"])
def test_projected_accumulation_of_proportional_gradients(factory, projector):
    """Then the first pass teaches the same subspace as all of them."""
    if factory is DCTAdamW and projector != "dct":
        projector = "svd"
    shares = (0.5, 0.25, 0.25)
    results = []
    for layerwise in (False, True):
        model = Model(torch.float64)
        optimizer = factory(
            model.parameters(), lr=1e-2, rank=RANK, update_proj_gap=3, projector=projector
        )
        if layerwise:
            optimizer.step_in_backward(accumulation_steps=3, accumulate="projected")
        for step in range(STEPS):
            for share in shares:
                loss_of(model, step, share).backward()
                if layerwise and share == 0.5:
                    kept = {name for name, p in model.named_parameters() if p.grad is not None}
                    assert kept == {"narrow", "vector", "scalar", "empty"}
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-6)


def test_the_first_pass_teaches_the_subspace():
    model = Model()
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    optimizer.step_in_backward(accumulation_steps=2, accumulate="projected")
    run(model, optimizer, range(1), passes=2)
    alone = Model()
    first = GaLoreAdamW(alone.parameters(), rank=RANK)
    run(alone, first, range(1))
    assert torch.equal(optimizer.state[model.tall]["basis"], first.state[alone.tall]["basis"])


def clipped(model, optimizer, max_norm, steps=range(STEPS)):
    """An ordinary loop with torch's clipping; return the norms it found."""
    norms = []
    for step in steps:
        loss_of(model, step).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("case", [case for case in CASES if not case.coarse], ids=str)
@pytest.mark.parametrize("again", ["graph", "forward"])
def test_two_passes_clip_exactly(case, again):
    (model, ordinary), (other, layerwise) = pair(case, torch.float64, max_norm=3.0)
    norms = clipped(model, ordinary, 3.0)
    assert min(norms) > 4
    for step, norm in enumerate(norms):
        loss = loss_of(other, step)
        with layerwise.measure_grad_norm():
            loss.backward(retain_graph=again == "graph")
            assert all(param.grad is None for param in other.parameters())
        (loss if again == "graph" else loss_of(other, step)).backward()
        layerwise.step()
        torch.testing.assert_close(layerwise.grad_norm.to(norm.dtype), norm, rtol=1e-6, atol=0)
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-6, atol=1e-6)


def test_clipping_by_the_step_before():
    """Factor min(1, max / n) with n the last norm of all, or the gradient's own if larger."""
    (model, ordinary), (other, layerwise) = pair(CASES[0], max_norm=3.0)
    before = 0.0
    for step in range(4):
        loss_of(model, step).backward()
        norms = [float(param.grad.norm()) for param in model.parameters()]
        for param, norm in zip(model.parameters(), norms, strict=True):
            param.grad *= min(1.0, 3.0 / (max(before, norm) + 1e-6))
        before = sum(norm**2 for norm in norms) ** 0.5
        ordinary.step()
        ordinary.zero_grad()
        loss_of(other, step).backward()
        layerwise.step()
        assert float(layerwise.grad_norm) == pytest.approx(before, rel=1e-5)
    for name, value in weights(model).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-4, atol=1e-5)


def test_the_norm_before_is_saved():
    (_, _), (model, optimizer) = pair(CASES[0], max_norm=3.0)
    run(model, optimizer, range(3))
    resumed_model = deepcopy(model)
    saved = deepcopy(optimizer.state_dict())
    run(model, optimizer, range(3, STEPS))
    resumed = CASES[0].build(resumed_model.named_parameters())
    resumed.load_state_dict(saved)
    resumed.step_in_backward(max_norm=3.0)
    run(resumed_model, resumed, range(3, STEPS))
    assert_same(weights(model), weights(resumed_model))
    assert resumed.grad_norm == optimizer.grad_norm


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


def test_a_second_gradient_before_step_is_refused():
    """The trap of layer-wise updates elsewhere: a step for every micro-batch."""
    (_, _), (model, optimizer) = pair(CASES[0])
    loss_of(model, 0).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"'\w+' of shape .*accumulation_steps"):
        loss_of(model, 1).backward()
    assert_same(weights(model), before)
    optimizer.zero_grad()
    loss_of(model, 1).backward()


def test_zero_grad_forgets_what_was_accumulated():
    for accumulate in ("full", "projected"):
        _, (other, optimizer) = pair(CASES[0], accumulation_steps=2, accumulate=accumulate)
        loss_of(other, 7).backward()
        optimizer.zero_grad()
        before = weights(other)
        optimizer.step()
        assert_same(weights(other), before)
        run(other, optimizer, range(1), passes=2)
        assert optimizer.state[other.tall]["step"] == 1


def test_float16_gradients_are_refused():
    model = Model(torch.float16)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    optimizer.step_in_backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="float16 gradient, which needs a GradScaler"):
        loss_of(model, 0).backward()
    assert_same(weights(model), before)


def test_grad_scaler_is_refused_with_a_reason():
    (_, _), (model, optimizer) = pair(CASES[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not go with step_in_backward"):
        scaler.step(optimizer)


def test_skip_nonfinite_needs_the_norm_first_and_then_leaves_no_trace():
    case = CASES[0]
    results = []
    for bad in (False, True):
        model = Model()
        optimizer = case.build(model.parameters(), skip_nonfinite=True)
        optimizer.step_in_backward(max_norm=100.0)
        for step in range(STEPS):
            if bad and step == 5:
                with optimizer.measure_grad_norm():
                    loss_of(model, step, float("inf")).backward()
                loss_of(model, step, float("inf")).backward()
                optimizer.step()
                assert optimizer.skipped_steps == 1
            with optimizer.measure_grad_norm():
                loss_of(model, step).backward()
            loss_of(model, step).backward()
            optimizer.step()
        results.append(weights(model))
    assert_same(*results)
    model = Model()
    optimizer = case.build(model.parameters(), skip_nonfinite=True)
    optimizer.step_in_backward()
    with pytest.raises(RuntimeError, match=r"skip_nonfinite=True.*measure_grad_norm"):
        loss_of(model, 0).backward()
    assert_same(weights(model), weights(Model()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps=0: accumulation_steps must be an int of"),
        ({"accumulation_steps": True}, "accumulation_steps must be an int"),
        ({"accumulate": "low"}, "accumulate must be one of 'full', 'projected'"),
        ({"max_norm": 0}, "max_norm must be None or a number above 0"),
        ({"accumulate": "projected"}, "needs the whole gradient"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    model = Model()
    optimizer = FiraAdamW(model.parameters(), rank=RANK)
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step_in_backward(**settings)
    loss_of(model, 0).backward()
    assert model.tall.grad is not None


def test_measuring_what_is_accumulated_is_refused():
    (_, optimizer), (_, layerwise) = pair(CASES[0], accumulation_steps=2)
    with pytest.raises(RuntimeError, match="measure_grad_norm is for step_in_backward"):
        optimizer.measure_grad_norm()
    with (
        pytest.raises(RuntimeError, match="clip_grad_norm_"),
        layerwise.measure_grad_norm(),
    ):
        pass


def test_without_its_optimizer_or_handle_a_hook_does_nothing():
    (_, _), (model, optimizer) = pair(CASES[0])
    before = weights(model)
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert model.tall.grad is not None
    assert_same(weights(model), before)


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
