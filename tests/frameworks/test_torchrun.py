"""Under torchrun: the README's recipes for several processes, and a run whose processes die."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from helpers import killed_worker
from helpers.places import RECIPES, ROOT, TESTS

pytestmark = pytest.mark.slow

PRELUDE = """
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)


class Block(nn.Linear):
    def forward(self, hidden):
        return hidden + super().forward(hidden).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.layers = nn.ModuleList([Block(40, 40), Block(40, 40)])
        self.head = nn.Linear(40, 50)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def loss_of(out, goal):
    loss = nn.functional.cross_entropy(out.flatten(0, 1), goal.flatten())
    losses.append(loss.item())
    return loss


path, losses, stack = Path(sys.argv[1]), [], ExitStack()
kind = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = Net().to(kind)
tokens = torch.randint(0, 50, (200, 2, 4, 6))[:, int(os.environ["RANK"])].to(kind)
batches = [(batch, batch) for batch in tokens]
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(tokens.flatten(0, 1), tokens.flatten(0, 1)), 8
)
destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
"""
JOINED = """
from helpers.fsdp2_on_cpu import joined_to_accelerate

dist.init_process_group()
if kind == "cpu":
    stack.enter_context(joined_to_accelerate({fsdp}))
"""
"""What a snippet finds that starts with a process group."""
CHECK = """
from lowrank_optim import LowRank

ours = getattr(optimizer, "optimizer", optimizer)
assert isinstance(ours, LowRank)
assert dist.get_world_size() == 2
projected = [group["params"] for group in ours.param_groups if group["rank"] is not None]
assert sum(len(params) for params in projected) == 2
assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
states = [value for state in ours.state.values() for value in state.values()]
ddp = isinstance(model, nn.parallel.DistributedDataParallel)
assert any(isinstance(value, DTensor) for value in states) != ddp
assert all(isinstance(param, DTensor) for param in model.parameters()) != ddp
assert ddp == (ours._session.process_group is not None)
whole = {
    name: param.full_tensor() if isinstance(param, DTensor) else param
    for name, param in model.named_parameters()
}
torch.save((whole, len(losses), ours.grad_norm), path / f"end-{dist.get_rank()}.pt")
stack.close()
destroy()
"""


def torchrun(script, folder, *options):
    """Run a script with two processes.

    Torch 2.13 lets restarted processes share the store of those that died, and find their
    addresses there (pytorch/pytorch#167288), unless it is told not to.
    """
    paths = os.pathsep.join(map(str, (ROOT, TESTS)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *options, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def run(recipe, folder):
    """Run a recipe; return weights, the number of losses and the norm of gradients, by rank."""
    starts = "init_process_group" not in recipe
    joined = JOINED.format(fsdp="fsdp_plugin" in recipe) if starts else ""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(PRELUDE + joined + recipe + CHECK)
    torchrun(script, folder)
    return [torch.load(folder / f"end-{rank}.pt", weights_only=True) for rank in range(2)]


def same(left, right):
    """Return whether two trees of tensors and numbers are equal to the bit, dtypes included."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(text, marks=[pytest.mark.long] * (place > 0))
        for place, text in enumerate(RECIPES)
    ],
    ids=range(len(RECIPES)),
)
def test_recipe_trains(recipe, tmp_path):
    """Both ranks end with the same weights; a recipe that saves goes on from what it saved."""
    ends = run(recipe, tmp_path / "run")
    assert same(ends[0][0], ends[1][0])
    assert (ends[0][2] is not None) == ("step_in_backward" in recipe)
    saved = sorted((tmp_path / "run").glob("[0-9]*/.metadata"))
    assert bool(saved) == ("dcp.save" in recipe)
    if saved:
        assert [file.parent.name for file in saved] == ["00000100", "00000200"]
        saved[-1].unlink()  # as if it had been killed while saving
        again = run(recipe, tmp_path / "run")
        assert [count for _, count, _ in again] == [100, 100]
        assert same(again[0][0], ends[0][0])


@pytest.mark.long
def test_a_killed_run_ends_as_if_it_had_not_been_killed(ranks, tmp_path):
    """One rank dies between backward and step, in the next life the other before it saves."""
    whole = ranks.run(2, killed_worker.train, tmp_path)[0]
    folder = tmp_path / "killed"
    folder.mkdir()
    torchrun(TESTS / "helpers" / "killed_worker.py", folder, "--max-restarts", "2")
    lives = [f"life-{life}-{rank}" for life in range(3) for rank in range(2)]
    starts = [(folder / life).read_text() for life in lives]
    assert starts == ["0", "0", "6", "6", "8", "8"]
    assert same(torch.load(folder / "end.pt", weights_only=True), whole)
