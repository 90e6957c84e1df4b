"""The command `memory`: what it prints, writes and says of mistakes; models and cards."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

from helpers.places import README
from lowrank_optim import cli, estimate_memory
from lowrank_optim.planner import PlanError, Plans, report
from lowrank_optim.planner.cards import CARDS, RESERVE, card_of
from lowrank_optim.planner.estimate import METHODS
from lowrank_optim.planner.models import build, without_values

pytestmark = pytest.mark.slow

SMALL = ["memory", "--model", "60m", "--rank", "64", "--seq", "32"]
FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 32)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)))

def plain():
    return Net()

def vision():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Linear(24, 10))
    def loss(model, batch, seq):
        return model(torch.ones(batch, 3, seq, seq, device="meta")).sum()
    return net, loss

def asks():
    class Asks(Net):
        def forward(self, tokens):
            return super().forward(tokens) if tokens.sum().item() else None
    return Asks()

def wrong():
    return 3

def frozen():
    return Net().requires_grad_(False)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHOWN = [name for name, method in METHODS.items() if method.in_planner]


def run(capsys, *arguments):
    """Run the command and return its status and what it printed."""
    status = cli.main([*arguments])
    return status, capsys.readouterr()


def test_table_has_a_column_a_method_and_fits_in_100_columns(capsys):
    status, printed = run(capsys, *SMALL, "--gpu", "24GiB", "--optimizer", ",".join(SHOWN))
    assert status == 0
    lines = printed.out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    (head,) = (line for line in lines if line.split()[:1] == ["GiB"] and "AdamW" in line)
    assert re.split(r"\s{2,}", head.strip())[1:] == [METHODS[name].label for name in SHOWN]
    first = [line.split()[0] for line in lines if line.strip()]
    for name in ("weights", "gradients", "state", "basis", "workspace", "activations", "total"):
        assert first.count(name) == 1
    (fits,) = (line.split() for line in lines if line.strip().startswith("in 23.00"))
    assert fits == ["in", "23.00", *["fits"] * len(SHOWN)]


def test_too_small_a_card_says_by_how_much(capsys):
    _, printed = run(capsys, *SMALL, "--gpu", "1.25GiB", "--optimizer", "adamw", "--json")
    (row,) = json.loads(printed.out)["methods"]
    assert row["fits"] is False
    assert row["spare"] == 2**28 - row["total"] < 0
    _, printed = run(capsys, *SMALL, "--gpu", "1.25GiB", "--optimizer", "adamw")
    lines = {line.split()[0]: line.split()[1:] for line in printed.out.splitlines() if line.strip()}
    assert lines["in"] == ["0.25", "no"]
    assert lines["spare"] == [f"{row['spare'] / 2**30:.2f}"]


def test_json_has_everything_and_parts_add_up(capsys):
    options = ("--layerwise", "--state", "8bit", "--gpu", "RTX 4090", "--checkpointing")
    status, printed = run(capsys, *SMALL, *options, "--optimizer", "adamw,apollo")
    assert status == 0
    status, printed = run(capsys, *SMALL, *options, "--optimizer", "adamw,apollo", "--json")
    found = json.loads(printed.out)
    assert (found["model"], found["parameters"]) == ("llama-60m", 58_073_600)
    assert (found["rank"], found["state_dtype"], found["layerwise"]) == (64, "8bit", True)
    assert found["gpu"]["usable"] == found["gpu"]["total"] - RESERVE
    adamw, apollo = found["methods"]
    assert (adamw["layerwise"], apollo["layerwise"]) == (False, True)
    for row in (adamw, apollo):
        for phase in row["phases"].values():
            assert phase.pop("total") == sum(phase.values())
        parts = row["phases"]["step"]
        assert parts["state"] + parts["basis"] == row["state_bytes"] + row["shared_bytes"]
    assert adamw["largest_rank"] is None
    assert apollo["largest_rank"] > 64
    assert apollo["largest_batch"] > adamw["largest_batch"] > 100


def test_a_rank_and_settings_change_what_they_should():
    small, large = (estimate_memory("60m", optimizer="galore", rank=r, seq=16) for r in (8, 64))
    assert small["galore"].state_bytes < large["galore"].state_bytes
    layerwise = estimate_memory("60m", optimizer="galore", rank=8, seq=16, layerwise=True)
    assert layerwise["galore"].total < small["galore"].total
    assert layerwise["galore"].state_bytes == small["galore"].state_bytes
    double = estimate_memory("60m", optimizer="galore", rank=8, seq=16, dtype=torch.float32)
    assert double["galore"].parts.weights > 1.9 * small["galore"].parts.weights
    saved = [
        estimate_memory("60m", optimizer="adamw", seq=512, checkpointing=on)["adamw"].total
        for on in (True, False)
    ]
    assert saved[0] < saved[1]


def test_figure_is_drawn(capsys, tmp_path):
    picture = tmp_path / "memory.png"
    status, _ = run(capsys, *SMALL, "--gpu", "L4", "--plot", str(picture))
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "llma-7b"], r"unknown model 'llma-7b'; did you mean llama-7b"),
        (["--model", "none/config.json"], r"no such file: none.config\.json"),
        (["--model", "factories.py"], r"factories\.py is no configuration of transformers"),
        (["--model", "nowhere:make"], r"nowhere:make makes no model: ModuleNotFoundError"),
        (["--model", "factories:nothing"], r"factories:nothing makes no model: AttributeError"),
        (["--model", "factories:wrong"], r"returns int: wanted a module"),
        (["--model", "factories:asks", "--rank", "4"], r"Asks cannot be run without values"),
        (["--model", "factories:frozen", "--rank", "4"], r"no parameter of Net is trainable"),
        (["--model", "factories:plain", "--rank", "4", "--checkpointing"], r"Net has no gradient"),
        (
            ["--model", "60m", "--gpu", "RTX 4091"],
            r"unknown card 'RTX 4091': did you mean RTX 4090",
        ),
        (["--model", "60m", "--gpu", "A100"], r"did you mean A100 40GB or A100 80GB\?"),
        (
            ["--model", "60m", "--optimizer", "galor"],
            r"unknown method 'galor': did you mean galore",
        ),
        (["--model", "60m", "--optimizer", "dct,dct"], r"methods must be named, each once"),
        (["--model", "60m", "--batch", "0"], r"batch must be an int of at least 1"),
        (
            ["--model", "60m", "--rank", "512"],
            r"no parameter of LlamaForCausalLM would be projected",
        ),
        (["--model", "60m", "--plot", "none/x.png"], r"there is no folder none"),
    ],
)
def test_mistakes_take_one_line(capsys, folder, options, said):
    status, printed = run(capsys, "memory", "--seq", "16", *options)
    assert status == 2
    assert printed.err.startswith("lowrank-optim: ")
    assert printed.err.count("\n") == 1
    assert re.search(said, printed.err), printed.err


def test_missing_transformers_names_the_extra(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "transformers" else real(name)
    )
    status, printed = run(capsys, *SMALL)
    assert status == 2
    assert 'pip install "lowrank-optim[transformers]"' in printed.err


def test_factories_make_any_module(folder):
    plain = estimate_memory("factories:plain", rank=4, batch=3, seq=5)
    assert plain.parameters == 50 * 16 + 17 * 32 + 33 * 50
    vision = estimate_memory("factories:vision", rank=4, batch=6, seq=4)
    assert vision["adamw"].parts.weights == 4 * (49 * 24 + 25 * 10)


def test_a_configuration_is_read_from_a_file_or_its_folder(tmp_path):
    GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=70).save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        model, loss = build(str(name), torch.float32)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert callable(loss)
    config = BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    plans = estimate_memory(str(tmp_path), rank=8, batch=2, seq=16)
    assert plans["galore"].total > plans["galore"].parts.weights > 0


def test_a_module_is_planned_without_touching_it():
    net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    net[1].weight = nn.Parameter(net[1].weight.detach(), requires_grad=False)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def loss(model, batch, seq):
        return model(torch.ones(batch, seq, 40, device="meta")).sum()

    plans = estimate_memory(net, rank=4, loss=loss, gpu=2**34)
    assert plans.model == "Sequential"
    assert plans["adamw"].state_bytes == 2 * 4 * (1200 + 30 + 20) + 3 * 4
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(param.grad is None for param in net.parameters())


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.head = nn.Linear(8, 30, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("angle", torch.ones(3))

    copied = without_values(Tied())
    assert copied.head.weight is copied.embed.weight
    assert copied.angle.is_meta


def test_cards_go_by_several_names():
    for text in ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090"):
        assert card_of(text) == ("RTX 4090", int(23.6 * 2**30)), text
    assert card_of("a100-80gb").name == card_of("A100 80").name == "A100 80GB"
    assert card_of("24GiB").total == card_of("24g").total == 24 * 2**30
    assert card_of("24GB").total == 24 * 10**9
    assert card_of("500MiB").total == 500 * 2**20
    assert card_of("500MiB").usable == 0
    assert all(card_of(name).name == name for name in CARDS)
    with pytest.raises(PlanError, match="known are RTX 3060"):
        card_of("!")


@pytest.mark.long
def test_readme_shows_what_the_command_prints(capsys):
    (given, shown) = re.search(
        r"```bash\nlowrank-optim (memory .*?)\n```\n.*?```text\n(.*?)```", README, re.S
    ).groups()
    status, printed = run(capsys, *shlex.split(given.replace("\\\n", " ")))
    assert status == 0
    lines = [line.rstrip() for line in printed.out.splitlines()]
    assert "\n".join(lines).strip("\n") == shown.strip("\n")


def test_a_table_of_all_methods_does_not_wrap():
    """The longest numbers that occur: hundreds of GiB, ranks and batches of four digits."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    plans = estimate_memory(model, optimizer="all", rank=4, seq=16, gpu="24GiB")
    assert [row.name for row in plans.rows] == list(METHODS)
    assert len(SHOWN) < len(METHODS)
    rows = [
        dataclasses.replace(
            row, spare=-123 * 2**30, largest_rank=4088, largest_batch=12345,
            phases={name: dataclasses.replace(p, weights=123 * 2**30)
                    for name, p in row.phases.items()},
        )
        for row in plans.rows
    ]  # fmt: skip
    console = Console(width=100)
    with console.capture() as captured:
        console.print(report.table(Plans("llama-13b", 1, plans.settings, plans.card, rows)))
    assert "…" not in captured.get()
    assert captured.get().count("-123.00") == len(METHODS)
