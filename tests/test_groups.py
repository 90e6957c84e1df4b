"""Which parameters of real architectures are projected."""

from __future__ import annotations

import pytest
import torch
from hf_models import gpt2, llama, mixtral
from torch import nn

from lowrank_optim import ApolloAdamW, GaLoreAdamW, param_groups


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
