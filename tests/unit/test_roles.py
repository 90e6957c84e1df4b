"""What a parameter is for: heads, embeddings, parametrized layers and state spaces."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    ZambaConfig,
    ZambaForCausalLM,
)

from helpers.hf_models import gpt2, llama, mixtral
from lowrank_optim import LowRankAdamW, MuonW, param_groups

LABELS = 200


def kinds(groups):
    """Return names by kind: projected, plain with decay, without."""
    found = {"projected": set(), "plain": set(), "no decay": set()}
    for group in groups:
        kind = "projected" if group["rank"] is not None else "plain"
        found["no decay" if group.get("weight_decay") == 0 else kind] |= set(group["param_names"])
    return found


def sorted_of(model, **settings):
    """All matrices count: their length is not what is tested here."""
    return kinds(param_groups(model, rank=1.0, weight_decay=0.1, **settings))


def on_meta(cls, config, **fields):
    with torch.device("meta"):
        return cls(config(**fields))


class Plain(nn.Module):
    """A module that has some others."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Tower(nn.Module):
    """A body with numbered layers, and what the test puts on top."""

    def __init__(self, **top):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({
            "fc": nn.Linear(40, 40), "head": nn.Linear(40, 40), "out_proj": nn.Linear(40, 40),
        })])  # fmt: skip
        for name, module in top.items():
            self.add_module(name, module)


BODY = {f"blocks.0.{name}.weight" for name in ("fc", "head", "out_proj")}


def classifier(*sizes):
    """A Sequential as torchvision's: linear layers with others between."""
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (nn.Dropout(), layer, nn.ReLU())))


@pytest.mark.parametrize(
    ("top", "heads"),
    [
        ({"fc": nn.Linear(40, 50)}, {"fc"}),
        ({"fc1": nn.Linear(40, 60), "fc2": nn.Linear(60, 50)}, {"fc2"}),
        ({"classifier": classifier(40, 60, 50)}, {"classifier.4"}),
        ({"classifier": nn.Sequential(nn.Conv2d(40, 50, 1), nn.ReLU())}, {"classifier.0"}),
        ({"head": Plain(norm=nn.LayerNorm(40), fc=nn.Linear(40, 50))}, {"head.fc"}),
        ({"lm_heads": nn.ModuleList([nn.Linear(40, 50), nn.Linear(40, 50)])},
         {"lm_heads.0", "lm_heads.1"}),
        ({"classification_head": Plain(dense=nn.Linear(40, 40), out_proj=nn.Linear(40, 50))},
         {"classification_head.out_proj"}),
        ({"box_head": Plain(layers=nn.ModuleList([nn.Linear(40, 60), nn.Linear(60, 50)]))},
         {"box_head.layers.1"}),
        ({"AuxLogits": nn.ModuleDict({"fc": nn.Linear(40, 50)}), "fc": nn.Linear(40, 50)},
         {"AuxLogits.fc", "fc"}),
        ({"conv_head": nn.Conv2d(40, 60, 1), "classifier": nn.Linear(60, 50)}, {"classifier"}),
        ({"pooler": nn.Linear(40, 40)}, set()),
        ({"attention": nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(40, 40)})}),
          "score": nn.Linear(40, 50)}, {"score"}),
    ],
)  # fmt: skip
def test_the_last_matrix_of_what_is_called_a_head_is_one_and_no_other(top, heads):
    """The same names inside numbered layers are none; names alone say the same."""
    model = Tower(**top)
    wanted = {f"{name}.weight" for name in heads}
    matrices = {name for name, param in model.named_parameters() if param.ndim > 1}
    assert matrices >= wanted
    for groups in (param_groups(model, rank=1.0), MuonW(model.named_parameters()).param_groups):
        found = kinds(groups)
        assert found["projected"] == matrices - wanted
        assert found["projected"] >= BODY


@pytest.mark.parametrize("wrap", ["config", "num_classes", "submodule"])
def test_a_layer_as_wide_as_the_labels_is_a_head_whatever_its_name(wrap):
    model = Tower(joined=nn.Linear(40, LABELS), square=nn.Linear(LABELS, LABELS))
    model.blocks[0]["wide"] = nn.Linear(40, LABELS)
    if wrap == "num_classes":
        model.num_classes = LABELS
    else:
        model.config = BertConfig(num_labels=LABELS)
    outer = nn.ModuleDict({"net": model, "beside": nn.Linear(40, LABELS)})
    found = sorted_of(outer if wrap == "submodule" else model)
    prefix = "net." if wrap == "submodule" else ""
    assert found["plain"] == {f"{prefix}joined.weight"}
    assert {f"{prefix}{name}.weight" for name in ("square", "blocks.0.wide")} <= found["projected"]
    assert wrap != "submodule" or "beside.weight" in found["projected"]


SMALL_BERT = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
              "intermediate_size": 96, "vocab_size": 90}  # fmt: skip
SMALL_T5 = {"num_layers": 1, "d_model": 64, "d_ff": 96, "num_heads": 4, "d_kv": 16,
            "vocab_size": 90}  # fmt: skip
SMALL_BART = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64, "vocab_size": 90,
              "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "config", "fields", "head"),
    [
        (RobertaForSequenceClassification, RobertaConfig, SMALL_BERT, "classifier.out_proj"),
        (ElectraForSequenceClassification, ElectraConfig, SMALL_BERT, "classifier.out_proj"),
        (BartForSequenceClassification, BartConfig, SMALL_BART, "classification_head.out_proj"),
        (T5ForSequenceClassification, T5Config, SMALL_T5, "classification_head.out_proj"),
        (ResNetForImageClassification, ResNetConfig, {"depths": [1, 1, 1, 1]}, "classifier.1"),
    ],
)
@pytest.mark.parametrize("labels", [3, LABELS])
def test_classification_heads_of_transformers(cls, config, fields, head, labels):
    found = sorted_of(on_meta(cls, config, num_labels=labels, **fields))
    assert f"{head}.weight" in found["plain"]
    assert not any(head in name for name in found["projected"])
    assert found["projected"]


def test_bodies_without_a_head_are_projected_in_full():
    """A pooler is the last matrix of BERT, and no output."""
    found = sorted_of(on_meta(BertModel, BertConfig, **SMALL_BERT))
    assert {"pooler.dense.weight", "encoder.layer.0.output.dense.weight"} <= found["projected"]
    block = nn.TransformerEncoderLayer(16, 2, 32)
    assert "linear2.weight" in sorted_of(block)["projected"]
    assert "out_proj.weight" in sorted_of(nn.MultiheadAttention(16, 2))["projected"]
    plain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9))
    assert sorted_of(plain)["projected"] == {"0.weight", "2.weight"}


class Raises(nn.Module):
    """As hostile as a model can be."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.body = nn.Linear(9, 7)
        self.score = nn.Linear(7, 5)

    def get_input_embeddings(self):
        raise self.error

    def get_output_embeddings(self):
        return "no module"

    @property
    def config(self):
        raise self.error

    num_classes = config


@pytest.mark.parametrize("error", [NotImplementedError(), AttributeError("x"), KeyError("x")])
def test_a_model_whose_methods_raise_is_sorted(error):
    assert sorted_of(Raises(error))["projected"] == {"body.weight"}
    assert sorted_of(nn.ModuleDict({"inner": Raises(error)}))["projected"] == {"inner.body.weight"}


class Declares(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.emit = nn.Linear(9, 7), nn.Linear(7, 5)

    def get_output_embeddings(self):
        return self.emit


def test_what_a_model_declares_is_its_head_whatever_its_name():
    assert sorted_of(Declares())["projected"] == {"body.weight"}


def test_models_that_have_no_input_embeddings_are_sorted():
    model = on_meta(
        Wav2Vec2ForCTC, Wav2Vec2Config, num_hidden_layers=1, hidden_size=64, num_attention_heads=4,
        intermediate_size=96, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    found = sorted_of(model)
    assert "lm_head.weight" in found["plain"]
    convolution = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original"
    assert f"{convolution}1" in found["plain"]
    assert f"{convolution}0" in found["no decay"]
    assert any("q_proj" in name for name in found["projected"])


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrized_weight_is_what_its_layer_is(kind):
    """Names of parameters change, roles do not; lengths are one number a row, and not decayed."""

    def build():
        return nn.ModuleDict({
            "line": nn.Conv1d(16, 32, 7), "embed_tokens": nn.Embedding(50, 16), "image":
            nn.Conv2d(3, 16, 3), "mlp": nn.Linear(16, 64), "table": nn.Embedding(20, 16),
            "classifier": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 50)),
        })  # fmt: skip

    model = build()
    for layer in (*(model[name] for name in ("line", "embed_tokens", "image", "mlp", "table")),
                  *model["classifier"]):  # fmt: skip
        PARAMETRIZED[kind](layer)
    before, after = sorted_of(build()), sorted_of(model)

    def layers(names):
        return {name.partition(".parametrizations")[0].partition(".weight")[0] for name in names}

    assert layers(after["projected"]) == layers(before["projected"])
    assert layers(after["projected"]) == {"image", "mlp", "classifier.0"}
    lengths = {name for name in after["no decay"] if not name.endswith("bias")}
    split = "weight_norm" in kind
    assert len(lengths) == (7 if split else 0)
    assert len(after["projected"]) == 3
    by_names = kinds(MuonW(model.named_parameters()).param_groups)
    assert layers(by_names["projected"]) - {"line", "table"} == layers(after["projected"])


STATE_SPACES = {
    "falcon": (FalconMambaForCausalLM, FalconMambaConfig, {"num_hidden_layers": 1}),
    "mamba2": (transformers.Mamba2ForCausalLM, transformers.Mamba2Config,
               {"num_hidden_layers": 1}),
    "mamba": (transformers.MambaForCausalLM, transformers.MambaConfig, {"num_hidden_layers": 1}),
    "jamba": (JambaForCausalLM, JambaConfig, {"num_hidden_layers": 5}),
    "zamba": (ZambaForCausalLM, ZambaConfig, {"num_hidden_layers": 12}),
    "rwkv": (RwkvForCausalLM, RwkvConfig, {"num_hidden_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_SPACES)
def test_of_state_spaces_the_matrices_alone_are_projected_and_decayed(name):
    cls, config, fields = STATE_SPACES[name]
    model = on_meta(cls, config, **fields)
    found = sorted_of(model)
    own = ("A_log", ".D", "dt_bias", "time_decay", "time_first", "time_mix", "dt_proj_bias")
    scales = {name for name, _ in model.named_parameters() if any(part in name for part in own)}
    assert scales
    assert scales <= found["no decay"]
    matrices = {
        "rwkv": "attention.key.weight",
        "zamba": "x_proj_weight",
        "mamba2": "in_proj.weight",
    }
    assert any(matrices.get(name, "x_proj.weight") in one for one in found["projected"])
    assert not any("conv1d" in one for one in found["projected"])


def test_tables_and_scales_are_no_matrices_and_experts_are():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            shapes = {
                "cls_token": (1, 1, 30), "query_tokens": (1, 9, 30), "relative_position_bias_table":
                (25, 30), "rel_pos_h": (25, 30), "attention_biases": (6, 30), "position_embedding":
                (9, 30), "alpha": (1, 30, 1), "gate_up_proj": (4, 30, 60), "down_proj": (1, 30, 30),
                "weight": (40, 30), "own": (40, 30),
            }  # fmt: skip
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    found = sorted_of(Own())
    assert found["projected"] == {"gate_up_proj", "down_proj", "weight", "own"}
    assert found["plain"] == {"query_tokens", "rel_pos_h", "position_embedding"}
    assert found["no decay"] == {
        "cls_token", "relative_position_bias_table", "attention_biases", "alpha",
    }  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        llama, gpt2, mixtral,
        lambda: llama(tie_word_embeddings=True),
        lambda: RobertaForSequenceClassification(RobertaConfig(num_labels=3, **SMALL_BERT)),
        lambda: RobertaForMaskedLM(RobertaConfig(**SMALL_BERT)),
        lambda: BertForMaskedLM(BertConfig(**SMALL_BERT)),
        lambda: T5ForSequenceClassification(T5Config(num_labels=3, **SMALL_T5)),
        lambda: Tower(fc=nn.Linear(40, 50)),
    ],
)  # fmt: skip
def test_a_module_and_its_named_parameters_are_sorted_as_by_param_groups(build):
    """The one-line swap: `rank` is the constructor's, and so is what groups do not name."""
    model = build()
    settings = {"min_dim": 1, "side": "right"}
    wanted = param_groups(model, rank=0.25, **settings)
    for params in (model, model.named_parameters(), list(model.named_parameters())):
        optimizer = LowRankAdamW(params, lr=3e-3, weight_decay=0.2, rank=0.25, **settings)
        assert [group["param_names"] for group in optimizer.param_groups] == [
            group["param_names"] for group in wanted
        ]
        for group, like in zip(optimizer.param_groups, wanted, strict=True):
            assert all(x is y for x, y in zip(group["params"], like["params"], strict=True))
            assert group["rank"] == like["rank"]
            assert group["lr"] == 3e-3
            assert group["weight_decay"] == like.get("weight_decay", 0.2)


def test_what_names_cannot_tell():
    """Types of layers, and what a model says of itself: documented, and no surprise."""
    model = nn.ModuleDict({
        "words": nn.Embedding(50, 40), "line": nn.Conv1d(40, 40, 30), "body": nn.Linear(40, 40),
    })  # fmt: skip
    assert kinds(MuonW(model).param_groups)["projected"] == {"body.weight"}
    by_names = kinds(MuonW(model.named_parameters()).param_groups)
    assert by_names["projected"] == {"words.weight", "line.weight", "body.weight"}


def test_names_within_groups_mean_what_they_say():
    model = Tower(fc=nn.Linear(40, 50))
    (group,) = MuonW([{"params": list(model.named_parameters())}]).param_groups
    assert len(group["params"]) == len(list(model.parameters()))


def test_wrappers_leave_no_trace_in_roles():
    model = Tower(fc=nn.Linear(40, 50), embed=nn.Linear(9, 40))
    compiled = torch.compile(model)
    found = sorted_of(compiled)
    assert found["plain"] == {"_orig_mod.fc.weight", "_orig_mod.embed.weight"}
    by_names = kinds(MuonW(compiled.named_parameters()).param_groups)
    assert by_names == found


def test_frozen_parameters_are_left_out_by_the_helper_and_taken_by_a_constructor():
    """As torch's optimizers take them: once they require a gradient they are trained."""
    model = Tower(fc=nn.Linear(40, 50))
    model.blocks[0]["fc"].requires_grad_(False)
    assert "blocks.0.fc.weight" not in sorted_of(model)["projected"]
    optimizer = MuonW(model)
    assert "blocks.0.fc.weight" in kinds(optimizer.param_groups)["projected"]
    model.blocks[0]["fc"].requires_grad_(True)
    before = model.blocks[0]["fc"].weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(model.blocks[0]["fc"].weight, before)


class WordModel(nn.Module):
    """A language model whose output layer has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(1000, 256)
        self.rnn = nn.LSTM(256, 256)
        self.decoder = nn.Linear(256, 1000)


class NormalizedLinear(nn.Linear):
    """A linear layer, whatever its name."""


def test_a_layer_that_gives_a_value_for_each_token_is_a_head():
    names = param_groups(WordModel(), rank=0.25)[0]["param_names"]
    assert names == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]


def test_a_linear_layer_is_no_norm_for_its_name():
    model = nn.ModuleDict(
        {"up": NormalizedLinear(128, 256), "normalizer_proj": nn.Linear(256, 128)}
    )
    assert param_groups(model, rank=0.25)[0]["param_names"] == [
        "up.weight",
        "normalizer_proj.weight",
    ]
    assert LowRankAdamW(model.named_parameters()).param_groups[0]["param_names"] == [
        "up.weight",
        "normalizer_proj.weight",
    ]
