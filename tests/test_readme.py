"""Every snippet of the README runs, and what it says of commands and figures is true."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
from cases import Model
from torch import nn

import lowrank_optim
from lowrank_optim import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
SHELL = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S))


class Net(nn.Module):
    """A model with what the snippets speak of: layers of matrices, an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.layers = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40)])
        self.head = nn.Linear(40, 50)

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
        "optimizer": lowrank_optim.GaLoreAdamW(model.parameters(), lr=1e-2, rank=8),
        "print": lambda *_: None,
    }


def one_pass(context, optimizer):
    """Train one pass over the batches and return the first and the last loss."""
    losses = []
    for inputs, targets in context["batches"] * 3:
        loss = context["loss_of"](context["model"](inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs_and_its_optimizer_trains(snippet, context):
    names = set(context)
    exec(compile(snippet, "README.md", "exec"), context)
    made = [value for name, value in context.items() if isinstance(value, torch.optim.Optimizer)]
    optimizer = made[-1]
    assert isinstance(optimizer, lowrank_optim.LowRank)
    assert any(group["rank"] is not None for group in optimizer.param_groups)
    first, last = one_pass(context, optimizer)
    assert last < first
    assert set(context) > names


def test_there_are_snippets_for_every_package_we_speak_of():
    assert len(SNIPPETS) >= 8
    joined = "".join(SNIPPETS)
    for package in ("galore_torch", "fira", "apollo_torch", "bitsandbytes"):
        assert f"was: from {package}" in joined


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for arguments in re.findall(r'make demo ARGS="(.*?)"', TEXT):
        cli.build_parser().parse_args(["demo", *shlex.split(arguments)])
    assert "pip install ." in SHELL


def test_linked_files_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_shares_of_the_table_are_measured():
    """The last column of the table of methods, on a square matrix at a quarter rank."""
    shares = dict(re.findall(r"^\| `(\w+)` .*\| ([\d.]+) % \|", TEXT, re.M))
    assert len(shares) == 5
    param = nn.Parameter(torch.randn(512, 512))
    param.grad = torch.randn_like(param)
    for name, share in shares.items():
        optimizer = getattr(lowrank_optim, name)([param], rank=0.25)
        optimizer.step()
        state = lowrank_optim.state_bytes(optimizer)
        assert state / (2 * param.numel() * 4) == pytest.approx(float(share) / 100, abs=0.001), name


def test_losses_of_three_seeds_are_those_on_file():
    with (ROOT / "benchmarks" / "results" / "demo_seeds.csv").open() as file:
        rows = list(csv.DictReader(file))
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(float(row["val_loss"]))
    heads, _, cells = re.search(r"^(\| AdamW \|.*)\n(.*)\n(.*)$", TEXT, re.M).groups()
    names = [head.strip().lower() for head in heads.strip("|").split("|")]
    for name, cell in zip(names, cells.strip("|").split("|"), strict=True):
        assert len(found[name]) == 3
        assert cell.strip() == f"{min(found[name]):.3f} - {max(found[name]):.3f}"


def test_default_weight_decay_and_eps_are_what_the_readme_says():
    optimizer = lowrank_optim.GaLoreAdamW(Model().parameters(), rank=3)
    assert optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["weight_decay"] == 0.01
