"""What Hugging Face's Trainer makes of our optimizers: groups, settings, refusals."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn
from transformers import Trainer

from helpers.hf_models import frozen_llama, gpt2, llama, mixtral
from helpers.hf_runs import SETTINGS, arguments, fields_by_name, trainer
from lowrank_optim import ApolloAdamW, DCTAdamW, FiraAdamW, GaLoreAdamW
from lowrank_optim.integrations import huggingface
from lowrank_optim.integrations.huggingface import trainer_optimizer

FIELDS = {"learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7,
          "weight_decay": 0.3}  # fmt: skip
MATRICES = {
    llama: ("model.layers.{}.{}.weight", "self_attn.q_proj self_attn.k_proj self_attn.v_proj "
            "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj", 0.78),
    gpt2: ("transformer.h.{}.{}.weight", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", 0.85),
    mixtral: ("model.layers.{}.{}", "self_attn.q_proj.weight self_attn.k_proj.weight "
              "self_attn.v_proj.weight self_attn.o_proj.weight mlp.experts.gate_up_proj "
              "mlp.experts.down_proj", 0.9),
}  # fmt: skip
"""Names of all attention, MLP and expert weights, and the least share of parameters they are."""


class Odd(nn.Module):
    """Where Trainer's rule of decay is not that of `param_groups`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 7)
        self.body = nn.Linear(7, 13)
        self.gate_norm = nn.Linear(13, 9)
        self.gain = nn.Parameter(torch.ones(13))


def built(model, args, optimizer=None):
    """Return the optimizer that Trainer makes."""
    return trainer(model, args, optimizer).create_optimizer()


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, frozen_llama, Odd])
@pytest.mark.parametrize("preset", [GaLoreAdamW, ApolloAdamW])
def test_every_field_is_that_of_adamw_in_trainer(build, preset, tmp_path):
    model = build()
    args = arguments(tmp_path, optim="adamw_torch", **FIELDS)
    theirs = built(model, args)
    ours = built(model, args, trainer_optimizer(preset, args, **SETTINGS))
    assert type(ours) is preset
    fields = fields_by_name(model, ours)
    assert fields == fields_by_name(model, theirs)
    assert set(fields) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {tuple(values[:3]) for values in fields.values()} == {(3e-3, (0.8, 0.95), 1e-7)}
    assert {values[3] for values in fields.values()} == {0.0, 0.3}


def test_groups_are_projected_or_not_and_decayed_or_not(tmp_path):
    args = arguments(tmp_path, **FIELDS)
    groups = built(Odd(), args, trainer_optimizer(GaLoreAdamW, args, rank=5)).param_groups
    assert [group["param_names"] for group in groups] == [
        ["body.weight"],
        ["gate_norm.weight"],
        ["embed.weight", "gain"],
        ["body.bias", "gate_norm.bias"],
    ]
    assert [(group["rank"], group["weight_decay"]) for group in groups] == [
        (5, 0.3), (5, 0.0), (None, 0.3), (None, 0.0),
    ]  # fmt: skip
    groups = built(llama(), args, trainer_optimizer(GaLoreAdamW, args, rank=5)).param_groups
    assert [(group["rank"], group["weight_decay"]) for group in groups] == [
        (5, 0.3), (None, 0.3), (None, 0.0),
    ]  # fmt: skip


def test_settings_take_precedence_over_arguments(tmp_path):
    model = llama()
    args = arguments(tmp_path, **FIELDS)
    optimizer = built(
        model,
        args,
        trainer_optimizer(
            FiraAdamW, args, rank=5, lr=0.5, rest_lr=0.25, betas=(0.7, 0.6), eps=1e-3,
            weight_decay=0.2, update_proj_gap=7, side="right", seed=3, include="mlp",
            exclude=r"layers\.1",
        ),
    )  # fmt: skip
    fields = fields_by_name(model, optimizer, ("lr", "betas", "eps", "weight_decay", "rank"))
    common = [(0.7, 0.6), 1e-3]
    for name, values in fields.items():
        projected = "layers.0.mlp" in name
        assert values == [0.5 if projected else 0.25, *common, 0.0 if "norm" in name else 0.2,
                          5 if projected else None], name  # fmt: skip
    main = optimizer.param_groups[0]
    assert [main[key] for key in ("update_proj_gap", "side", "seed")] == [7, "right", 3]


def test_arguments_are_read_when_trainer_builds_the_optimizer(tmp_path):
    """A search over hyper-parameters sets them after Trainer has been made."""
    args = arguments(tmp_path)
    made = trainer(llama(), args, trainer_optimizer(GaLoreAdamW, args, rank=5))
    made.args.learning_rate = 0.125
    assert {group["lr"] for group in made.create_optimizer().param_groups} == {0.125}


@pytest.mark.parametrize("build", MATRICES)
def test_all_attention_mlp_and_expert_weights_are_projected(build, tmp_path):
    model = build()
    args = arguments(tmp_path)
    optimizer = built(model, args, trainer_optimizer(DCTAdamW, args, **SETTINGS))
    template, matrices, share = MATRICES[build]
    wanted = {template.format(layer, matrix) for layer in range(2) for matrix in matrices.split()}
    projected = [group for group in optimizer.param_groups if group["rank"] is not None]
    assert {name for group in projected for name in group["param_names"]} == wanted
    params = [param for group in projected for param in group["params"]]
    total = sum(param.numel() for param in model.parameters())
    assert sum(param.numel() for param in params) > share * total


@pytest.mark.parametrize(
    ("changes", "settings", "error", "message"),
    [
        ({}, {"rnak": 5}, TypeError, "rnak"),
        ({}, {"rank": 0}, ValueError, "rank=0"),
        ({}, {"betas": (0.9, 1.5)}, ValueError, "betas"),
        ({}, {"rest_lr": -1.0}, ValueError, "lr=-1.0"),
        ({}, {"projector": "svdd"}, ValueError, "projector='svdd'"),
        ({"adam_beta2": 2.0}, {}, ValueError, "betas"),
        ({"optim_args": "rank=5"}, {}, ValueError, "optim_args='rank=5'.*trainer_optimizer"),
        ({"optim_target_modules": ["mlp"]}, {}, ValueError, r"\['mlp'\].*include="),
    ],
)
def test_what_cannot_be_is_refused_before_trainer_is_made(
    changes, settings, error, message, tmp_path
):
    args = arguments(tmp_path, **changes)
    with pytest.raises(error, match=message):
        trainer_optimizer(GaLoreAdamW, args, **{"rank": 5, **settings})


def test_other_optimizers_and_models_without_matrices_are_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(TypeError, match=r"torch.*AdamW.* is no optimizer class"):
        trainer_optimizer(torch.optim.AdamW, args)
    with pytest.raises(ValueError, match="no parameter of LlamaForCausalLM would be projected"):
        built(llama(), args, trainer_optimizer(GaLoreAdamW, args, rank=5, include="nowhere"))


def test_a_missing_framework_is_told_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'accelerate missing.*"lowrank-optim\[transformers\]"'):
        importlib.reload(huggingface)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers and accelerate missing"):
        importlib.reload(huggingface)


def test_layer_wise_updates_with_a_scaler_are_refused(tmp_path):
    args = arguments(tmp_path, fp16=True)
    with pytest.raises(ValueError, match=r"fp16=True .* step_in_backward: a GradScaler"):
        trainer_optimizer(GaLoreAdamW, args, step_in_backward=True)


def test_a_trainer_without_factories_is_told(tmp_path, monkeypatch):
    monkeypatch.delattr("transformers.trainer.is_optimizer_factory")
    with pytest.raises(ImportError, match="--upgrade transformers"):
        trainer_optimizer(GaLoreAdamW, arguments(tmp_path))


def adapters(rank=16):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(), lora)


@pytest.mark.parametrize("rank", [0.25, 16, 128, "auto"])
def test_adapters_alone_get_adamw_and_a_warning(rank, tmp_path):
    """As in SFTTrainer(peft_config=...): training goes on, and equals AdamW's to the bit."""
    torch.manual_seed(0)
    model, twin = adapters(), adapters()
    twin.load_state_dict(model.state_dict())
    args = arguments(tmp_path, max_steps=3)
    more = {"rank": rank, "projector": "power"}
    run = trainer(model, args, trainer_optimizer(GaLoreAdamW, args, **more))
    with pytest.warns(UserWarning, match="no parameter of .* is projected, all get AdamW's step"):
        run.create_optimizer()
    run.train()
    trainer(twin, args, (torch.optim.AdamW, {"lr": args.learning_rate})).train()
    for (name, param), (_, other) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert torch.equal(param, other), name


@pytest.mark.parametrize("by_place", [True, False])
def test_the_factory_takes_arguments_by_position_too(by_place, tmp_path):
    """axolotl's trainer calls it with the model and its arguments, Trainer with the model alone."""
    args, later = arguments(tmp_path), arguments(tmp_path, learning_rate=0.5)
    factory, settings = trainer_optimizer(GaLoreAdamW, args, rank=5)
    model = llama()
    optimizer = factory()(model, later, **settings) if by_place else factory()(model, **settings)
    wanted = later if by_place else args
    assert {group["lr"] for group in optimizer.param_groups} == {wanted.learning_rate}


class LossTrainer(Trainer):
    """As those of sentence-transformers: `loss` is a module, or a dict of some, with the model."""

    loss = None


def own_loss(model):
    loss = nn.Module()
    loss.model = model
    loss.classifier = nn.Linear(96, 3)
    loss.frozen = nn.Linear(4, 4).requires_grad_(False)
    return loss


@pytest.mark.parametrize("several", [False, True])
def test_weights_of_a_loss_are_trained_as_adamw_would(several, tmp_path):
    model = llama()
    args = arguments(tmp_path, **FIELDS)
    made = LossTrainer(
        model,
        args,
        optimizer_cls_and_kwargs=trainer_optimizer(GaLoreAdamW, args, rank=5, rest_lr=1e-4),
    )
    loss = own_loss(model)
    made.loss = {"pairs": loss, "other": nn.CosineSimilarity()} if several else loss
    optimizer = made.create_optimizer()
    prefix = "loss.pairs" if several else "loss"
    found = {
        name: (group["rank"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
        if name.startswith("loss")
    }
    assert found == {
        f"{prefix}.classifier.weight": (None, 1e-4, 0.3),
        f"{prefix}.classifier.bias": (None, 1e-4, 0.0),
    }
    given = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(given) == len({id(param) for param in given}) == len(list(model.parameters())) + 2
    before = loss.classifier.weight.detach().clone()
    for param in given:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(loss.classifier.weight, before)


def test_a_trainer_without_losses_of_its_own_has_the_groups_of_the_model(tmp_path):
    args = arguments(tmp_path)
    for loss in (None, nn.CrossEntropyLoss(), torch.nn.functional.mse_loss):
        made = LossTrainer(
            llama(), args, optimizer_cls_and_kwargs=trainer_optimizer(GaLoreAdamW, args, rank=5)
        )
        made.loss = loss
        names = [name for g in made.create_optimizer().param_groups for name in g["param_names"]]
        assert not any(name.startswith("loss") for name in names)
