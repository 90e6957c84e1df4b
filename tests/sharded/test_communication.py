"""Bytes that a step sends: the formulas of docs/scaling.md, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from helpers.sharded import cut, mesh_of
from helpers.wire import counted
from lowrank_optim import ApolloAdamW, DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW

pytestmark = pytest.mark.slow

ROWS, COLS, RANK, MATRICES, GAP = 14, 10, 4, 3, 3
FLAG = PEAK = NUMBER = 4
"""Bytes of a flag, of a largest value, of a number a matrix."""
BASIS = COLS * RANK * 4
ITERATIONS = 2 + 32 // RANK
SVD = {"all_reduce": PEAK, "reduce": 8 * COLS**2, "broadcast": BASIS}
POWER = {"all_reduce": PEAK + ITERATIONS * BASIS, "broadcast": BASIS}
METHODS = {
    "galore": (GaLoreAdamW, {}, SVD, 0),
    "galore-8bit": (GaLoreAdamW, {"state_dtype": "8bit"}, {**SVD, "broadcast": BASIS // 2}, 0),
    "galore-power": (GaLoreAdamW, {"projector": "power"}, POWER, 0),
    "dct": (DCTAdamW, {"update_proj_gap": GAP}, {"all_reduce": 4 * COLS}, 0),
    "fira": (FiraAdamW, {}, SVD, NUMBER),
    "fira-dct": (FiraAdamW, {"projector": "dct"}, {"all_reduce": 4 * COLS}, NUMBER),
    "frugal": (FrugalAdamW, {"rank": RANK}, {}, 0),
    "apollo": (ApolloAdamW, {}, {}, NUMBER),
    "apollo-mini": (ApolloAdamW, {"rank": 1}, {}, 3 * NUMBER),
    "galore-rms": (GaLoreAdamW, {"length": "rms"}, SVD, NUMBER),
    "galore-length": (GaLoreAdamW, {"length": "adamw"}, SVD, 2 * NUMBER),
    "frugal-length": (FrugalAdamW, {"rank": RANK, "length": "adamw"}, {}, 2 * NUMBER),
    "fira-rms": (FiraAdamW, {"length": "rms"}, SVD, (1 + 3) * NUMBER),
    "fira-length": (FiraAdamW, {"length": "adamw"}, SVD, (1 + 3 + 1) * NUMBER),
    "apollo-mini-length": (ApolloAdamW, {"rank": 1, "length": "adamw"}, {}, (3 + 3 + 1) * NUMBER),
}
CUT = {"galore-cut": (GaLoreAdamW, {"projector": "power", "shard_basis": True}, POWER, 0)}
"""A method, what a refresh of one matrix sends, and what each step sends for one."""


def steps(method, layout):
    """Return what each of some steps hands to collectives."""
    cls, settings, _, _ = {**METHODS, **CUT}[method]
    mesh = mesh_of(layout)
    params = [
        nn.Parameter(cut(torch.full((ROWS, COLS), 0.1), mesh, [Shard(0)])) for _ in range(MATRICES)
    ]
    plain = nn.Parameter(cut(torch.zeros(30), mesh, [Shard(0)]))
    matrices = {"params": params, "update_proj_gap": GAP, "rank": RANK, **settings}
    optimizer = cls([matrices, {"params": [plain], "rank": None}], stagger=False)
    found = []
    for step in range(2 * GAP):
        rng = torch.Generator().manual_seed(step)
        for param in [*params, plain]:
            grad = torch.randn(param.shape, generator=rng)
            param.grad = cut(grad, mesh, [Shard(0)])
        found.append(counted(optimizer.step).calls)
    return found


@pytest.mark.parametrize(
    ("layout", "method"),
    [*(("fsdp-2", method) for method in METHODS), ("fsdp-4", "galore"), ("fsdp-4", "fira-dct")],
)
def test_bytes_are_those_of_the_formula(ranks, method, layout):
    _, _, refresh, number = METHODS[method]
    for calls in ranks.run(int(layout[-1]), steps, method, layout):
        for step, made in enumerate(calls):
            wanted = {name: MATRICES * size for name, size in refresh.items()}
            if step % GAP:
                wanted = {}
            if step == 0 and refresh:
                # Once more, whether the first gradients were of use: known from then on.
                again = MATRICES * PEAK
                wanted["all_reduce"] = wanted.get("all_reduce", 0) + again
            if number:
                wanted["all_reduce"] = wanted.get("all_reduce", 0) + MATRICES * number
            sent = {}
            for name, size in made:
                sent[name] = sent.get(name, 0) + size
            assert sent == wanted, (step, made)
            if number and step % GAP:
                assert len(made) == 1, "all matrices' numbers in one collective"


def exchanged(layout):
    """Return what a step sends that projects the axis which is cut."""
    mesh = mesh_of(layout)
    value = torch.full((ROWS, COLS), 0.1)
    param = nn.Parameter(cut(value, mesh, [Shard(0)]))
    optimizer = FrugalAdamW([param], rank=RANK, side="left")
    found = []
    for _ in range(2):
        param.grad = cut(torch.randn(ROWS, COLS), mesh, [Shard(0)])
        found.append(counted(optimizer.step).calls)
    return found, 4 * param.to_local().numel()


def test_columns_for_rows_are_three_exchanges_of_what_is_held(ranks):
    for found, held in ranks.run(2, exchanged, "fsdp-2"):
        for calls in found:
            assert [name for name, _ in calls] == ["all_to_all"] * 3
            assert sum(size for _, size in calls) == 3 * held


@pytest.mark.parametrize("layout", ["fsdp-2", "fsdp-4"])
def test_cut_bases_are_gathered_when_they_are_used(ranks, layout):
    """Once a step, and once more where they move; chunks of uneven bases are padded."""
    count = int(layout[-1])
    basis = -(-COLS // count) * count * RANK * 4
    for calls in ranks.run(count, steps, "galore-cut", layout):
        for step, made in enumerate(calls):
            gathered = [size for name, size in made if name == "all_gather"]
            assert gathered == [basis] * MATRICES * (1 if step % GAP else 2)
            assert step % GAP == 0 or len(made) == len(gathered)
