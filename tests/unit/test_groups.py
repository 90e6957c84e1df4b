"""Which parameters of real architectures are projected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.hf_models import gpt2, llama, mixtral
from lowrank_optim import (
    ApolloAdamW,
    AutoRank,
    Blocks,
    CondaW,
    FrugalAdamW,
    GaLoreAdamW,
    MuonW,
    TrionW,
    param_groups,
)


def names(groups):
    """Return the names by kind: projected, plain with decay, plain without."""
    found = {"projected": set(), "plain": set(), "no decay": set()}
    for group in groups:
        kind = "projected" if group["rank"] is not None else "plain"
        kind = "no decay" if group.get("weight_decay") == 0.0 else kind
        found[kind] |= set(group["param_names"])
        assert len(group["params"]) == len(group["param_names"])
    return found


def test_llama():
    model = llama()
    found = names(param_groups(model, rank=8, weight_decay=0.1))
    layer = "model.layers.{}.{}.weight"
    matrices = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    assert found["projected"] == {layer.format(i, m) for i in range(2) for m in matrices}
    assert found["plain"] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("norm" in name for name in found["no decay"])
    assert sum(map(len, found.values())) == len(list(model.parameters()))


def test_gpt2_conv1d_is_projected_and_the_tied_head_stands_once():
    model = gpt2()
    groups = param_groups(model, rank=8, weight_decay=0.1)
    found = names(groups)
    assert len(found["projected"]) == 2 * 4
    assert "transformer.h.0.attn.c_attn.weight" in found["projected"]
    assert found["plain"] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert all("ln_" in name or name.endswith("bias") for name in found["no decay"])
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    share = sum(p.numel() for p in groups[0]["params"]) / sum(p.numel() for p in params)
    assert share > 0.8


def test_mixtral_experts_are_projected_as_stacks():
    model = mixtral()
    groups = param_groups(model, rank=8)
    experts = [name for name in groups[0]["param_names"] if "experts" in name]
    assert experts
    by_name = dict(model.named_parameters())
    assert any(by_name[name].ndim == 3 for name in experts)
    assert "lm_head.weight" not in groups[0]["param_names"]
    projected = sum(p.numel() for p in groups[0]["params"])
    assert projected / sum(p.numel() for p in model.parameters()) > 0.9


def test_tied_and_frozen():
    model = llama(tie_word_embeddings=True)
    model.model.layers[0].requires_grad_(False)
    found = names(param_groups(model, rank=8, weight_decay=0.1))
    assert found["plain"] == {"model.embed_tokens.weight"}
    assert not any("layers.0" in name for kind in found.values() for name in kind)
    assert len(found["projected"]) == 7


def test_rates_decay_include_exclude_and_settings():
    groups = param_groups(
        llama(), rank=8, lr=1e-3, rest_lr=1e-2, weight_decay=0.1, exclude=r"layers\.1\..*down",
        include="mlp", update_proj_gap=50,
    )  # fmt: skip
    projected, plain, no_decay = groups
    assert (projected["lr"], plain["lr"], no_decay["lr"]) == (1e-3, 1e-2, 1e-2)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert projected["update_proj_gap"] == 50
    assert len(projected["params"]) == 5
    assert "model.layers.1.mlp.down_proj.weight" in plain["param_names"]
    assert [group["lr"] for group in param_groups(llama(), rank=8, lr=1e-3)] == [1e-3] * 3
    assert "lr" not in param_groups(llama(), rank=8)[0]


def test_vision_model_convolutions_norms_and_embedding_parameters():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4)
            self.pos_embed = nn.Parameter(torch.zeros(1, 9, 16))
            self.norm = nn.GroupNorm(4, 16)
            self.block = nn.TransformerEncoderLayer(16, 2, 32)
            self.head = nn.Linear(16, 10)

    found = names(param_groups(Vision(), rank=4))
    assert {"patch.weight", "block.linear1.weight", "block.self_attn.in_proj_weight"} <= (
        found["projected"]
    )
    assert found["plain"] == {"pos_embed", "head.weight"}
    assert {"patch.bias", "norm.weight", "head.bias", "block.norm1.weight"} <= found["no decay"]


def test_attention_outputs_are_no_heads():
    """BERT names an attention projection `output.dense`: only the last component counts."""
    model = nn.ModuleDict({"attention": nn.ModuleDict({"output": nn.ModuleDict(
        {"dense": nn.Linear(8, 8)})}), "score": nn.Linear(8, 2)})  # fmt: skip
    groups = param_groups(model, rank=2)
    assert groups[0]["param_names"] == ["attention.output.dense.weight"]


@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
@pytest.mark.parametrize("preset", [GaLoreAdamW, ApolloAdamW])
def test_real_models_train_and_tell_their_coverage(build, preset):
    torch.manual_seed(0)
    model = build()
    optimizer = preset(param_groups(model, rank=8, lr=3e-3, weight_decay=0.0))
    batch = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(15):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    share = float(optimizer.summary().splitlines()[0].split(": ")[1].split("%")[0])
    assert share > 80


def test_heads_are_looked_for_outside_numbered_layers_only():
    """GPT-J and CodeGen name the second matrix of each MLP `fc_out`."""
    block = nn.ModuleDict({"fc_in": nn.Linear(16, 32), "fc_out": nn.Linear(32, 16)})
    model = nn.ModuleDict({"h": nn.ModuleList([block]), "fc_out": nn.Linear(16, 64)})
    found = names(param_groups(model, rank=4))
    assert found["projected"] == {"h.0.fc_in.weight", "h.0.fc_out.weight"}
    assert found["plain"] == {"fc_out.weight"}


def test_biases_of_two_dimensions_and_marked_parameters_are_not_decayed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 32))
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 32))
            self.a_log = nn.Parameter(torch.zeros(16, 12))
            self.a_log._no_weight_decay = True

    found = names(param_groups(Experts(), rank=4, weight_decay=0.1))
    assert found["projected"] == {"gate_up_proj"}
    assert found["no decay"] == {"gate_up_proj_bias", "a_log"}


def test_what_cannot_be_projected_has_the_rates_of_the_plain_parameters():
    model = nn.ModuleDict({
        "router": nn.Linear(64, 8), "matrix": nn.Linear(64, 64), "conv": nn.Conv1d(64, 64, 5),
    })  # fmt: skip
    groups = param_groups(model, rank=16, lr=1e-2, rest_lr=1e-3)
    assert groups[0]["param_names"] == ["matrix.weight"]
    assert set(groups[1]["param_names"]) == {"router.weight", "conv.weight"}
    assert groups[1]["lr"] == 1e-3
    with pytest.raises(ValueError, match="axes longer than rank=64"):
        param_groups(model, rank=64)


LENGTHS = {"long": (9, 40), "short": (7, 40), "tall": (40, 7), "stack": (3, 9, 40),
           "conv": (40, 1, 2, 3), "pair": (3, 40, 7)}  # fmt: skip
LONG = {"long", "stack"}


def of_lengths():
    model = nn.Module()
    for name, shape in LENGTHS.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


@pytest.mark.parametrize("side", ["auto", "left", "right", "reverse"])
@pytest.mark.parametrize(
    ("preset", "rank", "taken"),
    [
        (GaLoreAdamW, 0.3, LONG),
        (GaLoreAdamW, "auto", LONG),
        (GaLoreAdamW, AutoRank(0.9, 0.5, 1.0), LONG),
        (CondaW, 0.3, LONG),
        (TrionW, 0.3, LONG),
        (GaLoreAdamW, 3, set(LENGTHS)),
        (MuonW, 1.0, set(LENGTHS)),
        (CondaW, 1.0, set(LENGTHS)),
    ],
)
def test_a_share_leaves_matrices_with_a_short_axis_plain(preset, rank, taken, side):
    """The shorter axis counts, whichever is projected; group, constructor and helper agree."""
    model, settings = of_lengths(), {"side": side, "min_dim": 8}
    more = {"projector": "power"} if rank == "auto" else {}
    optimizers = [
        preset(model.parameters(), rank=rank, **settings, **more),
        preset([{"params": list(model.parameters()), "rank": rank, **settings}], **more),
        preset(model, rank=rank, **settings, **more),
        preset(param_groups(model, rank=rank, **settings), **more),
    ]
    for optimizer in optimizers:
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        whole = {"step", "exp_avg", "exp_avg_sq"}
        plain = {
            name
            for name, param in model.named_parameters()
            if set(optimizer.state[param]) == whole
            and optimizer.state[param]["exp_avg_sq"].shape == param.shape
        }
        assert set(LENGTHS) - plain == taken
    (first, *rest) = optimizers[-1].param_groups
    assert set(first["param_names"]) == taken
    assert first["min_dim"] == 8
    assert all(group["rank"] is None for group in rest)


def test_the_least_axis_is_128_by_default_and_one_takes_all():
    at, below = nn.Parameter(torch.zeros(128, 300)), nn.Parameter(torch.zeros(127, 300))
    for least, ranks in (({}, ["basis"]), ({"min_dim": 1}, ["basis", "basis"])):
        optimizer = GaLoreAdamW([at, below], rank=0.25, projector="power", **least)
        for param in (at, below):
            param.grad = torch.randn_like(param)
        optimizer.step()
        assert [key for p in (at, below) for key in optimizer.state[p] if key == "basis"] == ranks


def test_shares_of_matrices_are_no_shares_of_an_axis():
    params = [nn.Parameter(torch.randn(9, 7)) for _ in range(4)]
    optimizer = FrugalAdamW(params, rank=0.5, projector=Blocks("ascending"))
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    kept = [optimizer.state[param]["exp_avg"].numel() for param in params]
    assert sorted(kept) == [0, 0, 63, 63]


@pytest.mark.parametrize("bad", [0, -3, 1.5, True, "128", None])
def test_a_least_axis_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match=r"min_dim=.*an int of at least 1"):
        GaLoreAdamW([nn.Parameter(torch.zeros(9, 7))], rank=0.3, min_dim=bad)
    with pytest.raises(ValueError, match=r"min_dim=.*in group 0.*an int of at least 1"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(9, 7))], "min_dim": bad}], rank=0.3)


def test_where_no_matrix_is_long_enough_all_is_plain_and_said():
    """The first group is what would be projected, with the rates of the plain ones."""
    model = nn.ModuleDict({"body": nn.Linear(20, 30), "score": nn.Linear(30, 5)})
    said = r"no parameter of ModuleDict is projected, all get AdamW's step.*min_dim=128.*min_dim=1"
    with pytest.warns(UserWarning, match=said):
        groups = param_groups(model, rank=0.25, lr=1e-2, rest_lr=1e-3)
    assert [group["param_names"] for group in groups][:2] == [["body.weight"], ["score.weight"]]
    assert [group["rank"] for group in groups] == [0.25, None, None]
    assert [group["lr"] for group in groups] == [1e-3] * 3
    twin = nn.ModuleDict({"body": nn.Linear(20, 30), "score": nn.Linear(30, 5)})
    twin.load_state_dict(model.state_dict())
    optimizer = GaLoreAdamW(groups, weight_decay=0.0)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    for pair in zip(model.parameters(), twin.parameters(), strict=True):
        pair[0].grad = torch.randn_like(pair[0])
        pair[1].grad = pair[0].grad.clone()
    with pytest.warns(UserWarning, match="projects none of its 4 parameter tensors"):
        optimizer.step()
    plain.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_constructor_says_so_too_and_an_int_takes_short_matrices():
    model = nn.ModuleDict({"body": nn.Linear(20, 30), "score": nn.Linear(30, 5)})
    for params in (model, model.named_parameters()):
        with pytest.warns(UserWarning, match="is projected, all get AdamW's step"):
            GaLoreAdamW(params, rank=0.25)
    with pytest.warns(UserWarning, match="axes longer than rank=20"):
        GaLoreAdamW(model, rank=20)
    assert GaLoreAdamW(model, rank=4).param_groups[0]["param_names"] == ["body.weight"]
    with pytest.raises(ValueError, match="no parameter of ModuleDict would be projected"):
        GaLoreAdamW(nn.ModuleDict({"score": nn.Linear(30, 5)}), rank=4)
    for nothing in (nn.ReLU(), nn.LayerNorm(9), nn.Linear(200, 200).requires_grad_(False)):
        with pytest.raises(ValueError, match="would be projected: it has no trainable matrix"):
            param_groups(nothing, rank=0.25)
    with pytest.raises(ValueError, match="include='nowhere'"):
        param_groups(model, rank=0.25, include="nowhere")
