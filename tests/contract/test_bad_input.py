"""Bad input: one clear error that names the thing and the way out, and nothing changed."""

from __future__ import annotations

import re

import pytest
import torch

from helpers.cases import CASES, GAP, PRESETS, Model, assert_same, gradient, train, weights
from lowrank_optim import (
    DCT,
    ApolloAdamW,
    Blocks,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GradScaled,
    LowRank,
    NormScaled,
    Power,
    StateFree,
    param_groups,
)
from lowrank_optim.settings.plans import plan_of

nan = float("nan")
SETTINGS = {
    "rank": [0, -1, 1.5, 0.0, -0.5, True, "8", nan],
    "lr": [-1e-3, nan, float("inf"), "0.1", torch.ones(2)],
    "betas": [(1.0, 0.9), (0.9, -0.1), (0.9,), 0.9, (0.9, 0.99, 0.999), None],
    "eps": [-1e-8, nan, "x"],
    "weight_decay": [-0.1, nan],
    "update_proj_gap": [0, -1, 2.5, "200", True],
    "scale": [-1.0, nan],
    "projector": ["pca", 3, DCT],
    "side": ["std", "middle", None],
    "on_refresh": ["drop", None],
    "state_dtype": ["4bit", torch.int8, torch.float16, 8],
    "stochastic_rounding": [1, "yes"],
    "skip_nonfinite": [1],
    "maximize": [1],
    "capturable": [1, None],
    "stagger": [0, "yes"],
    "seed": [-1, 0.5, None],
    "impl": ["cuda", None],
}


def a_matrix(shape=(8, 6)):
    return torch.nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in SETTINGS.items() for value in values],
    ids=str,
)
def test_bad_setting_is_refused_by_name_in_constructor_and_group(key, value):
    with pytest.raises(ValueError, match=key):
        GaLoreAdamW([a_matrix()], **{"rank": 2, key: value})
    with pytest.raises(ValueError, match=f"{key}=.* in group 1"):
        GaLoreAdamW([{"params": [a_matrix()]}, {"params": [a_matrix()], key: value}], rank=2)
    optimizer = GaLoreAdamW([a_matrix()], rank=2)
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group({"params": [a_matrix()], key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("preset", [GaLoreAdamW, DCTAdamW, FiraAdamW, ApolloAdamW, LowRank])
def test_no_rank_anywhere_is_an_error_that_says_so(preset):
    with pytest.raises(ValueError, match="no group has a rank"):
        preset([a_matrix()])
    with pytest.raises(ValueError, match="no group has a rank"):
        FrugalAdamW([a_matrix()], rank=None)
    preset([{"params": [a_matrix()]}, {"params": [a_matrix()], "rank": 2}])


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match=r"^GaLoreAdamW.*'update_gap': did you mean 'update_proj_"):
        GaLoreAdamW([a_matrix()], rank=2, update_gap=100)
    with pytest.raises(TypeError, match=r"^FiraAdamW.*'density': use 'rank'"):
        FiraAdamW([a_matrix()], density=0.25)
    with pytest.raises(TypeError, match=r"^FrugalAdamW.*'nonsense': it has no such setting"):
        FrugalAdamW([a_matrix()], nonsense=1)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ranks", "did you mean 'rank'"),
        ("update_gap", "did you mean 'update_proj_gap'"),
        ("wieght_decay", "did you mean 'weight_decay'"),
        ("beta", "did you mean 'betas'"),
        ("Lr", "did you mean 'lr'"),
        ("projection", "did you mean 'projector'"),
        ("proj", "use 'projector'"),
        ("density", "use 'rank'"),
        ("limiter", "residual=NormScaled"),
        ("state_free_scale", "residual=StateFree"),
        ("scale_type", "ApolloAdamW"),
    ],
)
def test_near_miss_in_a_group_is_refused(key, message):
    with pytest.raises(ValueError, match=f"{key}.*{message}"):
        GaLoreAdamW([{"params": [a_matrix()], "rank": 2, key: 1}])


def test_foreign_group_keys_are_kept():
    extra = {"param_names": ["w"], "fused": None, "foreach": False, "lr_scale": 0.5, "name": "a",
             "initial_lr": 1e-3, "layer": 3}  # fmt: skip
    optimizer = GaLoreAdamW([{"params": [a_matrix()], "rank": 2, **extra}])
    assert {key: optimizer.param_groups[0][key] for key in extra} == extra


def test_keys_of_galore_torch_and_fira_are_understood():
    group = {"params": [a_matrix()], "rank": 2, "update_proj_gap": 50, "alpha": 0.5}
    optimizer = FiraAdamW([{**group, "proj_type": "reverse_std"}])
    (read,) = optimizer.param_groups
    assert (read["scale"], read["side"], read["update_proj_gap"]) == (0.5, "reverse", 50)
    with pytest.raises(ValueError, match="proj_type='full'"):
        GaLoreAdamW([{**group, "proj_type": "full"}])
    with pytest.raises(ValueError, match="both 'scale' and 'alpha'"):
        GaLoreAdamW([{**group, "scale": 1.0}])
    with pytest.raises(ValueError, match="both 'side' and 'proj_type'"):
        GaLoreAdamW([{**group, "proj_type": "std", "side": "left"}])


def test_callers_group_is_not_changed():
    group = {"params": [a_matrix()], "rank": 2, "alpha": 0.5}
    GaLoreAdamW([group])
    assert set(group) == {"params", "rank", "alpha"}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: Power(0), "iterations"),
        (lambda: DCT("l3"), "norm"),
        (lambda: Blocks("zigzag"), "order"),
        (lambda: NormScaled(0.5), "limiter"),
        (lambda: NormScaled(form="book"), "form"),
        (lambda: GradScaled(per="column"), "per"),
        (lambda: GradScaled(-1), "limiter"),
        (lambda: StateFree("adam"), "state_free"),
        (lambda: StateFree(scale=-1), "state_free_scale"),
    ],
)
def test_parts_check_themselves(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()


def test_trained_parameters_must_be_real_and_floating():
    value = torch.ones(8, 6, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(8, 6\).*complex64"):
        GaLoreAdamW([value], rank=2)
    optimizer = GaLoreAdamW([a_matrix()], rank=2)
    optimizer.param_groups[0]["params"].append(value)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*complex64"):
        optimizer.step()


BAD_GRADIENTS = {
    "sparse": (lambda p: torch.zeros_like(p).to_sparse(), "sparse gradient"),
    "complex": (None, "complex gradient"),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_sparse_gradient_is_refused_before_anything_changes(case, named):
    model = Model()
    optimizer = case.build(model.named_parameters() if named else model.parameters())
    train(model, optimizer, range(1))
    before, states = weights(model), state_of(optimizer)
    for position, param in enumerate(model.parameters()):
        param.grad = gradient(param, 1, position)
    model.vector.grad = torch.zeros_like(model.vector).to_sparse()
    what = "'vector' of shape" if named else "6 of group 0, of shape"
    with pytest.raises(RuntimeError, match=rf"parameter {what} \(11,\).*sparse gradient"):
        optimizer.step()
    assert_same(weights(model), before)
    assert_same(state_of(optimizer), states)


def state_of(optimizer):
    return {
        f"{place}.{key}": torch.as_tensor(value).clone()
        for place, state in enumerate(optimizer.state.values())
        for key, value in state.items()
    }


def test_complex_gradient_is_refused():
    param = a_matrix()
    optimizer = GaLoreAdamW([param], rank=2)
    param.data = param.data.to(torch.complex64)
    param.grad = torch.ones(8, 6, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*complex gradient"):
        optimizer.step()
    assert not optimizer.state


def test_flat_shards_are_refused():
    """What ZeRO and FSDP1 hand out: refused at construction where it shows, else at the step."""
    shard = torch.nn.Parameter(torch.randn(48))
    shard.ds_shape = torch.Size([8, 6])
    with pytest.raises(RuntimeError, match=r"flat piece of a matrix of shape \(8, 6\).*FSDP2"):
        GaLoreAdamW([shard], rank=2)
    flat = torch.nn.Parameter(torch.randn(48))
    flat._is_flat_param = True
    with pytest.raises(RuntimeError, match=r"flat piece of matrices.*FSDP2"):
        GaLoreAdamW([flat], rank=2)
    param = a_matrix()
    optimizer = GaLoreAdamW([("layer.weight", param)], rank=2)
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(param.detach().flatten())
    optimizer.param_groups[0]["params"][0].grad = torch.ones(48)
    with pytest.raises(RuntimeError, match=r"'layer.weight'.*flat piece of a matrix.*\(8, 6\)"):
        optimizer.step()
    assert not optimizer.state


def test_rank_cannot_change_under_state():
    param = a_matrix()
    optimizer = GaLoreAdamW([param], rank=2)
    param.grad = torch.randn(8, 6)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["rank"] = 3
    with pytest.raises(RuntimeError, match=r"shape \(8, 2\), and should have \(8, 3\)"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("value", [nan, float("inf")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_non_finite_gradient_never_raises_and_keeps_a_learned_basis(case, value):
    """At a refresh and between: bases stay valid, as in AdamW the moments take the value."""
    model = Model()
    optimizer = case.build(model.parameters())
    train(model, optimizer, range(GAP))
    learns = plan_of(optimizer.param_groups[0]).projector.learns
    kept = ("basis", "index") if learns else ()
    old = {name: state_of(optimizer)[f"0.{name}"] for name in kept if name in first(optimizer)}
    for position, param in enumerate(model.parameters()):
        param.grad = gradient(param, GAP, position)
        if param.numel() > 1:
            param.grad.view(-1)[1] = value
    optimizer.step()
    exact = "align" not in case.name
    for name, before in old.items():
        now = torch.as_tensor(first(optimizer)[name])
        torch.testing.assert_close(now, before, rtol=0, atol=0 if exact else 1e-5)


def first(optimizer):
    return next(iter(optimizer.state.values()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_skip_nonfinite_leaves_everything_and_counts(case):
    model, twin = Model(), Model()
    optimizer = case.build(model.parameters(), skip_nonfinite=True)
    plain = case.build(twin.parameters())
    for step in range(GAP + 2):
        train(model, optimizer, range(step, step + 1))
        train(twin, plain, range(step, step + 1))
        before, states = weights(model), state_of(optimizer)
        for position, param in enumerate(model.parameters()):
            param.grad = gradient(param, step, position)
        model.square.grad[3, 3] = nan if step % 2 else float("inf")
        optimizer.step()
        assert_same(weights(model), before)
        assert_same(state_of(optimizer), states)
        assert optimizer.skipped_steps == step + 1
    assert_same(weights(model), weights(twin))
    assert f"{GAP + 2} steps left out" in optimizer.summary()
    assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == GAP + 2


def test_group_settings_reach_every_preset():
    for preset in PRESETS:
        settings = {"rank": 2, "update_proj_gap": 3, "scale": 0.7, "seed": 4, "side": "left"}
        optimizer = preset([{"params": [a_matrix()], **settings}])
        assert {k: optimizer.param_groups[0][k] for k in settings} == settings


def test_messages_are_one_sentence_with_a_way_out():
    with pytest.raises(
        ValueError, match=re.escape("rank=0: rank must be None, an int of at least")
    ):
        GaLoreAdamW([a_matrix()], rank=0)
    with pytest.raises(ValueError, match="'svd', 'power', 'dct', 'random', 'columns', 'blocks'"):
        GaLoreAdamW([a_matrix()], rank=2, projector="pca")


def test_param_groups_refuses_a_model_without_matrices():
    with pytest.raises(ValueError, match="no parameter of Embedding would be projected"):
        param_groups(torch.nn.Embedding(10, 4), rank=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("update_proj_gap", 0), ("betas", (0.9, 1.0)), ("eps", "1e-8"), ("lr", nan), ("seed", -1),
     ("impl", "tritn"), ("side", "middle"), ("weight_decay", None)],
)  # fmt: skip
def test_a_setting_spoiled_between_steps_is_refused_before_anything_moves(key, value):
    params = [torch.nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    optimizer = GaLoreAdamW([{"params": [param], "rank": 2} for param in params])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    counts = [float(optimizer.state[param]["step"]) for param in params]
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError, match=rf"{key}=.* in group 1"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
    assert [float(optimizer.state[param]["step"]) for param in params] == counts


@pytest.mark.parametrize(
    "change",
    [
        {"projector": "dct"},
        {"residual": "norm_scaled"},
        {"feed": "error_feedback"},
        {"rule": "row_column_scaled", "projector": "identity"},
    ],
)
def test_parts_that_do_not_fit_the_state_are_refused(change):
    param = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = GaLoreAdamW([param], rank=2)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0].update(change)
    with pytest.raises(RuntimeError, match="cannot change once there is state"):
        optimizer.step()
    assert torch.equal(param, before)
