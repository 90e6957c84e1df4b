"""Lengths of updates of parameters that are cut over processes: the numbers of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from helpers.cases import CASES, GAP, RANK, Model, gradient, train
from helpers.sharded import (
    LAYOUTS,
    cut,
    mesh_of,
    placements_for,
    run_case,
    same_everywhere,
    size_of,
    whole,
)
from lowrank_optim import FiraAdamW, GaLoreAdamW, LowRankAdamW, NorMuonW
from lowrank_optim.parts import length as lengths

pytestmark = pytest.mark.slow

STEPS = GAP + 2
MEASURED = [case for case in CASES if case.measured]
WHOLE = ("muon", "racs", "rmnp", "trion", "conda", "compensated", "error-feedback", "auto-rank")
OTHERS = [
    replace(case, name=f"{case.name}-length", settings={**case.settings, "length": "adamw"})
    for case in CASES
    if case.name in WHOLE
]
"""Cases whose directions take another way: matrices taken whole, feeds, ranks that change."""
FEW = 20
"""Entries of a sample that lie in some columns of each row alone, where 1024 would be all."""


@contextmanager
def few_entries() -> Iterator[None]:
    """Let samples have `FEW` entries."""
    lengths.ENTRIES, kept = FEW, lengths.ENTRIES
    try:
        yield
    finally:
        lengths.ENTRIES = kept


def differences(cases, layout, side):
    """Return for each case how far the weights are from those of one process.

    The samples are those of one process to the bit: they are entries of the same gradients.
    """
    found = {}
    for case in cases:
        with few_entries():
            ours, sharded = run_case(case, layout, torch.float64, STEPS, {"side": side})
            theirs = Model(torch.float64)
            alone = case.build(theirs.parameters(), side=side)
            train(theirs, alone, range(STEPS))
        far = 0.0
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert same_everywhere(whole(left))
            if right.numel():
                far = max(far, float((whole(left) - right.detach()).abs().max()))
            for key, value in alone.state.get(right, {}).items():
                if key.startswith(lengths.SAMPLE):
                    assert value.shape[-1] == -(-FEW // value.shape[-2])
                    assert torch.equal(whole(sharded.state[left][key]), value), key
        found[case.name] = far
    return found


OFTEN = ("fsdp-2", "columns-4", "hybrid")
"""Layouts that `make test` takes: rows, columns, and copies of rows."""


@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=[] if x in OFTEN else [pytest.mark.long]) for x in LAYOUTS],
)
def test_a_sample_lies_where_it_does_on_one_process(ranks, layout):
    for found in ranks.run(size_of(layout), differences, MEASURED, layout, "right"):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        pytest.param("fsdp-2", OTHERS, id="fsdp-2"),
        pytest.param("fsdp-4", OTHERS[::2], id="fsdp-4", marks=pytest.mark.long),
        pytest.param("hybrid", OTHERS[1::2], id="hybrid", marks=pytest.mark.long),
    ],
)
def test_every_way_to_a_direction_has_its_length(ranks, layout, cases):
    assert len(OTHERS) == len(WHOLE)
    for found in ranks.run(size_of(layout), differences, cases, layout, "right"):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("layout", ["fsdp-2", pytest.param("fsdp-4", marks=pytest.mark.long)])
def test_rows_that_are_columns_of_the_parameter_are_sampled_alike(ranks, layout):
    """The projected axis is the one that is cut: what is stepped is exchanged before."""
    for found in ranks.run(size_of(layout), left_differences, layout):
        assert found < 1e-12


def left_differences(layout):
    """Return how far a matrix, seen transposed, is from one process's."""
    start = torch.randn(13, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    runs = []
    for cuts in (True, False):
        mesh = mesh_of(layout)
        value = cut(start, mesh, placements_for(start, layout)) if cuts else start.clone()
        param = nn.Parameter(value)
        with few_entries():
            optimizer = FiraAdamW([param], rank=RANK, side="left", lr=1e-2, length="adamw")
            for step in range(STEPS):
                grad = gradient(start, step, 0)
                param.grad = cut(grad, mesh, placements_for(grad, layout)) if cuts else grad
                optimizer.step()
        runs.append(whole(param))
    return float((runs[0] - runs[1]).abs().max())


def experts(layout, shape):
    """Train a stack that is cut along its matrices, some processes holding none, and alone."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mesh = mesh_of(layout)
    found = []
    for cls, settings in (
        (GaLoreAdamW, {"rank": RANK}),
        (LowRankAdamW, {"rank": RANK}),
        (NorMuonW, {}),
    ):
        runs = []
        for cuts in (True, False):
            param = nn.Parameter(
                cut(start, mesh, placements_for(start, layout)) if cuts else start.clone()
            )
            with few_entries():
                optimizer = cls([param], lr=1e-2, side="right", length="adamw", **settings)
                for step in range(STEPS):
                    grad = gradient(start, step, 0)
                    grad[step % shape[0]] = 0  # an expert without tokens
                    param.grad = cut(grad, mesh, placements_for(grad, layout)) if cuts else grad
                    optimizer.step()
            runs.append(whole(param))
        found.append(float((runs[0] - runs[1]).abs().max()))
    return found


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("fsdp-2", (3, 8, 5)),
        pytest.param("fsdp-4", (3, 8, 5), marks=pytest.mark.long),
        ("nested", (5, 6, 9)),
        pytest.param("rows-columns", (3, 8, 5), marks=pytest.mark.long),
    ],
)
def test_each_expert_has_its_sample_wherever_it_lies(ranks, layout, shape):
    for found in ranks.run(size_of(layout), experts, layout, shape):
        assert max(found) < 1e-12, found


def copies(length):
    """Train ordinary tensors with a process group, and without one."""
    runs = []
    for group in (dist.group.WORLD, None):
        model = Model(torch.float64)
        settings = {"rank": RANK, "update_proj_gap": GAP, "length": length, "process_group": group}
        optimizer = GaLoreAdamW(model.parameters(), lr=1e-2, **settings)
        train(model, optimizer, range(STEPS))
        assert all(same_everywhere(param) for param in model.parameters())
        runs.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_copies_have_one_length(ranks):
    for length in ("rms", "adamw"):
        ranks.run(2, copies, length)
