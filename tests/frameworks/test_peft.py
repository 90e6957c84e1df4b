"""PEFT models: frozen bases are left alone, adapters get AdamW, whole modules are projected."""

from __future__ import annotations

import io

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.cases import FULL, GAP, PRESETS, assert_same, weights
from lowrank_optim import GaLoreAdamW, param_groups

RANK = 6
"""Above the rank of the adapters, 4, and below every axis of the base model's matrices."""

STEPS = 2 * GAP + 1
each_preset = pytest.mark.parametrize("preset", [p for p in PRESETS if p not in FULL])


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=29,
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def lora(**changes):
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def adapted(**changes):
    return get_peft_model(base(), lora(**changes))


def train(model, *optimizers, steps=STEPS, start=0):
    for step in range(start, start + steps):
        rng = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 29, (2, 7), generator=rng)
        model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def trainable(model):
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def kinds(groups):
    """Return the names of the projected and of the other parameters."""
    projected, others = set(), set()
    for group in groups:
        (others if group["rank"] is None else projected).update(group["param_names"])
    return projected, others


@each_preset
@pytest.mark.filterwarnings("ignore:.*projects none of its:UserWarning")
def test_adapters_get_the_step_of_torchs_adamw_bit_for_bit(preset):
    """Given all parameters, as trainers do: no state is kept for those that are frozen."""
    model, twin = adapted(), adapted()
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizer = preset(model.parameters(), rank=RANK, **settings)
    frozen = {name: p.clone() for name, p in weights(model).items() if name not in trainable(model)}
    train(model, optimizer)
    train(twin, torch.optim.AdamW(trainable(twin).values(), **settings))
    assert_same(weights(model), weights(twin))
    assert optimizer.state.keys() == set(trainable(model).values())
    assert all(torch.equal(weights(model)[name], value) for name, value in frozen.items())


def test_adapters_alone_leave_nothing_to_project_and_that_is_said():
    """Their matrices are as narrow as their rank: plain AdamW keeps the same state."""
    model = adapted()
    with pytest.raises(ValueError, match="no parameter of PeftModelForCausalLM would be projected"):
        param_groups(model, rank=RANK)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK)
    with pytest.warns(UserWarning, match="projects none of its 8 parameter tensors"):
        train(model, optimizer, steps=1)


def test_groups_of_a_model_with_whole_modules():
    """The base is left out; adapters, embedding and head are plain; whole modules are not."""
    model = adapted(modules_to_save=["mlp", "lm_head", "embed_tokens", "norm"])
    groups = param_groups(model, rank=RANK, weight_decay=0.1)
    projected, others = kinds(groups)
    assert projected | others == set(trainable(model))
    mlp = "base_model.model.model.layers.{}.mlp.modules_to_save.default.{}_proj.weight"
    matrices = {mlp.format(layer, part) for layer in (0, 1) for part in ("gate", "up", "down")}
    assert projected == matrices
    no_decay = [name for g in groups if g["weight_decay"] == 0 for name in g["param_names"]]
    assert no_decay == [name for name in trainable(model) if "norm" in name]


def test_a_share_as_rank_would_project_adapters_too():
    """A quarter of an adapter's rank, here one column: `exclude` leaves them plain."""
    model = adapted(modules_to_save=["mlp"])
    assert any("lora_" in name for name in kinds(param_groups(model, rank=0.25))[0])
    projected, others = kinds(param_groups(model, rank=0.25, exclude="lora_"))
    assert all("mlp" in name for name in projected)
    assert all("lora_" in name for name in others)


@each_preset
def test_adapters_that_are_projected_train_from_a_first_gradient_of_zero(preset):
    """One factor of LoRA starts at zero, so that the other has no gradient at first."""
    model = adapted()
    optimizer = preset(param_groups(model, rank=2), lr=1e-2, update_proj_gap=100, seed=1)
    start = weights(model)
    train(model, optimizer, steps=1)
    still = [name for name, value in weights(model).items() if torch.equal(value, start[name])]
    assert not any("lora_B" in name for name in still)
    train(model, optimizer)
    waits = [state["pending"] for state in optimizer.state_dict()["state"].values()
             if "pending" in state]  # fmt: skip
    assert not any(waits)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert moved == set(trainable(model))


@each_preset
def test_adapters_and_whole_modules_train_in_one_optimizer(preset):
    """As two optimizers would: the preset for what is projected, AdamW for the rest."""
    changes = {"modules_to_save": ["mlp"]}
    model, twin = adapted(**changes), adapted(**changes)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizer = preset(param_groups(model, rank=RANK), update_proj_gap=GAP, **settings)
    start = weights(model)
    train(model, optimizer)
    projected, plain = param_groups(twin, rank=RANK)
    apart = preset([projected], update_proj_gap=GAP, **settings)
    train(twin, apart, torch.optim.AdamW(plain["params"], **settings))
    assert_same(weights(model), weights(twin))
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert moved == set(trainable(model))


@each_preset
def test_an_adapter_added_later(preset):
    """The first adapter rests while the second trains; a resumed run agrees."""
    model = adapted(modules_to_save=["mlp"])
    optimizer = preset(param_groups(model, rank=RANK, lr=1e-2), update_proj_gap=GAP)
    train(model, optimizer, steps=GAP)
    before = weights(model)
    model.add_adapter("second", lora())
    model.set_adapter("second")
    named = trainable(model)
    assert all("second" in name for name in named)
    optimizer.add_param_group({"params": list(named.items()), "lr": 3e-3, "rank": None})
    train(model, optimizer, steps=GAP, start=GAP)
    assert_same({name: weights(model)[name] for name in before}, before)
    assert all(float(optimizer.state[param]["step"]) == GAP for param in named.values())

    other_model = adapted(modules_to_save=["mlp"])
    groups = param_groups(other_model, rank=RANK, lr=1e-2)
    other_model.add_adapter("second", lora())
    other_model.set_adapter("second")
    group = {"params": list(trainable(other_model).items()), "lr": 3e-3, "rank": None}
    other = preset([*groups, group], update_proj_gap=GAP)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for pair in ((model, optimizer), (other_model, other)):
        pair[0].set_adapter("default")
        train(*pair, steps=GAP, start=20)
    assert_same(weights(model), weights(other_model))
    assert {float(optimizer.state[param]["step"]) for param in trainable(model).values()} == {
        2 * GAP
    }


@each_preset
def test_a_saved_adapter_resumes_bit_identically(preset, tmp_path):
    """The adapter through PEFT's own files, the optimizer through torch's."""
    model = adapted(modules_to_save=["mlp"])
    settings = {"lr": 1e-2, "update_proj_gap": GAP}
    optimizer = preset(param_groups(model, rank=RANK), **settings)
    train(model, optimizer, steps=GAP + 1)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    other = preset(param_groups(resumed, rank=RANK), **settings)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, start=20)
    train(resumed, other, start=20)
    assert_same(weights(model), weights(resumed))
