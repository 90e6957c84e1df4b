"""Every snippet of the README runs, and what it says of commands and figures is true."""

from __future__ import annotations

import csv
import functools
import re
import shlex

import lightning
import pytest
import torch
from galore_torch import GaLoreAdamW
from torch import nn

import lowrank_optim
from helpers.cases import FULL, PRESETS, Model
from helpers.hf_models import llama
from helpers.hf_runs import arguments, texts
from helpers.places import README as TEXT
from helpers.places import RECIPES, ROOT
from lowrank_optim import cli

ALL = re.findall(r"^```python ?(\w*)\n(.*?)^```", TEXT, re.M | re.S)
SNIPPETS = [(kind, snippet) for kind, snippet in ALL if kind != "torchrun"]
"""What a snippet needs beside the usual, and the snippet."""
SHELL = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S))


LONG = {"hidden_size": 128, "intermediate_size": 144}
"""Axes of which a share may be taken, see `min_dim`."""


class Net(nn.Module):
    """A model with what the snippets speak of: layers of matrices, an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.layers = nn.ModuleList([nn.Linear(128, 128), nn.Linear(128, 128)])
        self.head = nn.Linear(128, 50)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).relu()
        return self.head(hidden)


@pytest.fixture
def context(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (6, 8, 10))
    model = Net()
    matrices = [layer.weight for layer in model.layers]
    return {
        "torch": torch,
        "model": model,
        "matrices": matrices,
        "others": [p for p in model.parameters() if not any(p is q for q in matrices)],
        "batches": [(batch, batch) for batch in tokens],
        "loss_of": lambda out, goal: nn.functional.cross_entropy(out.flatten(0, 1), goal.flatten()),
        "path": tmp_path / "checkpoint.pt",
        "device": "cpu",
        "optimizer": lowrank_optim.GaLoreAdamW(model.parameters(), lr=1e-2, rank=8),
        "print": lambda *_: None,
    }


def for_trainer(context, tmp_path):
    """Transformers' Trainer: a LLaMA, arguments and data."""
    return {"model": llama(**LONG), "args": arguments(tmp_path), "train_dataset": texts()}


def for_lightning(context, tmp_path):
    """Lightning: the batches in a loader; its logs, bar and checkpoints stay away."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"default_root_dir": tmp_path, "enable_checkpointing": False, **quiet}
    tokens = torch.cat([inputs for inputs, _ in context["batches"]])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, tokens), 8)
    trainer = functools.partialmethod(lightning.Trainer.__init__, **defaults)
    context["patch"].setattr(lightning.Trainer, "__init__", trainer)
    return {"loader": loader}


def for_peft(context, tmp_path):
    """PEFT: a model with the modules of a LLaMA, whose output is an object."""

    def loss_of(out, goal):
        return nn.functional.cross_entropy(out.logits.flatten(0, 1), goal.flatten())

    return {"model": llama(**LONG), "loss_of": loss_of}


def for_galore(context, tmp_path):
    """A checkpoint of galore_torch after three steps."""
    groups = [{"params": context["others"]}, {
        "params": context["matrices"], "rank": 16, "update_proj_gap": 200, "scale": 0.25,
        "proj_type": "std",
    }]  # fmt: skip
    theirs = GaLoreAdamW(groups, lr=0.01)
    for _ in range(3):
        for param in context["model"].parameters():
            param.grad = torch.randn_like(param)
        theirs.step()
    theirs.zero_grad()
    torch.save(theirs.state_dict(), context["path"])
    return {}


NEEDS = {
    "": lambda *_: {},
    "trainer": for_trainer,
    "lightning": for_lightning,
    "peft": for_peft,
    "galore": for_galore,
}


def one_pass(context, optimizer):
    """Train on, and return the loss of the first batch before and after."""
    losses = []
    for inputs, targets in [*context["batches"] * 3, context["batches"][0]]:
        loss = context["loss_of"](context["model"](inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.filterwarnings("ignore:The .train_dataloader.:UserWarning")
@pytest.mark.parametrize(("kind", "snippet"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs_and_its_optimizer_trains(kind, snippet, context, tmp_path, monkeypatch):
    context["patch"] = monkeypatch
    context.update(NEEDS[kind](context, tmp_path))
    names = set(context)
    file = tmp_path / "snippet.py"
    file.write_text(snippet)
    exec(compile(snippet, str(file), "exec"), context)
    assert set(context) > names
    trainer = context.get("trainer")
    if trainer is None:
        made = [item for item in context.values() if isinstance(item, torch.optim.Optimizer)]
        optimizer = made[-1]
    else:
        optimizer = trainer.optimizers[0] if kind == "lightning" else trainer.optimizer
    ours = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(ours, lowrank_optim.LowRank)
    assert any(group["rank"] is not None for group in ours.param_groups)
    if trainer is None:
        first, last = one_pass(context, ours)
        assert last < first
    else:
        assert max(state["step"] for state in ours.state.values()) >= 3


def test_what_needs_several_processes_is_run_by_torchrun():
    assert [snippet for kind, snippet in ALL if kind == "torchrun"] == RECIPES
    assert len(RECIPES) == TEXT.count("```python torchrun")
    joined = "".join(RECIPES)
    for name in ("dcp.save", "fsdp_version=2", "DistributedDataParallel", "step_in_backward"):
        assert name in joined, name


def test_there_are_snippets_for_every_package_we_speak_of():
    assert len(SNIPPETS) >= 8
    joined = "".join(snippet for _, snippet in SNIPPETS)
    for package in ("galore_torch", "fira", "apollo_torch", "bitsandbytes"):
        assert f"was: from {package}" in joined
    for package in ("accelerate", "lightning", "peft", "safetensors", "transformers"):
        assert re.search(rf"^(from|import) {package}\b", joined, re.M), package


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for given in re.findall(r'make demo ARGS="(.*?)"', TEXT):
        cli.build_parser().parse_args(["demo", *shlex.split(given)])
    assert "pip install ." in SHELL


def test_linked_files_exist():
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", TEXT):
        path, _, heading = link.partition("#")
        assert (ROOT / path).exists(), link
        if heading:
            found = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M)
            assert heading in [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in found
            ]


def test_shares_of_the_table_are_measured():
    """A column of the tables of methods, on a square matrix at a quarter rank."""
    found = re.findall(r"^\| `(\w+)` .*?\| ([\d.]+) %(?:, ([\d.]+) %)? \|", TEXT, re.M)
    assert {name for name, *_ in found} == {preset.__name__ for preset in PRESETS}
    small = {"TrionW": {"momentum_dtype": "8bit"}, "LDAdamW": {"error_dtype": "8bit"}}
    param = nn.Parameter(torch.randn(512, 512))
    param.grad = torch.randn_like(param)
    for name, share, less in found:
        make = getattr(lowrank_optim, name)
        rank = {"rank": 1.0 if make in FULL and name != "TrionW" else 0.25}
        for said, more in ((share, {}), (less, small.get(name, {"state_dtype": "8bit"}))):
            if said:
                optimizer = make([param], **rank, **more)
                optimizer.step()
                state = lowrank_optim.state_bytes(optimizer) / (2 * param.numel() * 4)
                assert state == pytest.approx(float(said) / 100, abs=0.0012), name


def test_default_weight_decay_and_eps_are_what_the_readme_says():
    optimizer = lowrank_optim.GaLoreAdamW(Model().parameters(), rank=3)
    assert optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["weight_decay"] == 0.01


def test_kills_and_resumes_are_those_on_file():
    with (ROOT / "benchmarks" / "results" / "kill_resume.csv").open() as file:
        rows = list(csv.DictReader(file))
    said = re.search(
        r"at 20 random moments .*? After (\d+) kills, (\d+) of", " ".join(TEXT.split())
    )
    assert said is not None
    assert int(said[1]) == sum(int(row["kills_hit"]) for row in rows)
    assert int(said[2]) == sum(int(row["while_saving"]) for row in rows)
    assert {(row["identical"], row["kill_points"]) for row in rows} == {("yes", "20")}
    assert {row["loop"] for row in rows} == {"plain", "flat", "trainer", "lightning"}


def test_losses_of_bf16_weights_are_those_on_file():
    with (ROOT / "benchmarks" / "results" / "bf16_weights.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = {(r["task"], r["method"], r["weights"], r["seed"]): float(r["val_loss"]) for r in rows}
    methods = sorted({row["method"] for row in rows})
    starts = {float(row["start_loss"]) for row in rows if row["task"] == "continue"}
    (start,) = starts

    def means(task, method):
        kinds = ("fp32", "nearest", "stochastic")
        losses = [[ends.get((task, method, kind, seed)) for seed in "012"] for kind in kinds]
        return [sum(part) / 3 if None not in part else None for part in losses], losses[0]

    lost = {}
    for method in methods:
        (whole, nearest, _), _ = means("continue", method)
        lost[method] = round(100 * (nearest - whole) / (start - whole))
        found, runs = means("demo", method)
        spread = max(runs) - min(runs)
        assert all(abs(mean - found[0]) <= spread for mean in found if mean is not None)
    assert f"torch's AdamW {lost.pop('adamw')} %" in TEXT
    assert f"lose {min(lost.values())} to {max(lost.values())} % of what the five" in " ".join(
        TEXT.split()
    )
    for (task, method, kind, seed), loss in ends.items():
        if (task, kind) == ("continue", "stochastic"):
            assert abs(loss - ends[task, method, "fp32", seed]) <= 0.0004
