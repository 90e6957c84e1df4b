"""The tables of docs/scaling.md are what its script makes, and its formulas are the package's."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from helpers.places import BENCHMARKS
from helpers.sharded import cut, mesh_of
from helpers.wire import counted
from lowrank_optim import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    predicted_bytes,
    state_bytes,
)
from lowrank_optim.engine.memory import shared_bytes

pytestmark = pytest.mark.slow

SCRIPT = BENCHMARKS / "scaling.py"
RANK = 8
OURS = {
    "galore": (GaLoreAdamW, {}),
    "galore-power": (GaLoreAdamW, {"projector": "power"}),
    "galore-cut": (GaLoreAdamW, {"projector": "power", "shard_basis": True}),
    "dct": (DCTAdamW, {}),
    "fira": (FiraAdamW, {"projector": "power"}),
    "frugal": (FrugalAdamW, {}),
    "apollo": (ApolloAdamW, {}),
}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("scaling")
    sys.modules.pop("scaling")
    sys.modules.pop("scaling_costs")


@pytest.fixture
def costs(scaling):
    return importlib.import_module("scaling_costs")


@pytest.fixture
def tiny(costs):
    """A model of rank `RANK` at a share of `RANK / 32`."""
    return costs.Model("tiny", 32, 40, 1, 4, 2, 50)


def optimizer_of(costs, name, state_dtype=None):
    """An optimizer after a step, and the shapes of its parameters: matrices, and what is plain.

    One matrix has fewer rows than the rank.
    """
    shapes = [costs.Shape(48, 32, 2), costs.Shape(24, 40), costs.Shape(6, 40)]
    shapes += [costs.Shape(160, 33, projected=False), costs.Shape(37, 1, 3, projected=False)]
    groups = {True: [], False: []}
    for shape in shapes:
        size = (shape.rows, shape.cols) if shape.cols > 1 else (shape.rows,)
        groups[shape.projected] += [nn.Parameter(torch.randn(size)) for _ in range(shape.count)]
    factory, settings = OURS[name]
    optimizer = factory(
        [
            {"params": groups[True], "rank": RANK, "side": "right"},
            {"params": groups[False], "rank": None},
        ],
        state_dtype=state_dtype,
        **settings,
    )
    for param in groups[True] + groups[False]:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer, shapes


def kept(costs, name, shape, rank, gpus, small=False):
    """Bytes that the formulas give for one parameter, on the GPU that has the most."""
    sharded = costs.sharded_bytes(name, shape, rank, gpus, small)
    return sharded + costs.replicated_bytes(name, shape, rank, small)


@pytest.mark.parametrize("small", [False, True], ids=["float32", "8bit"])
@pytest.mark.parametrize("name", OURS)
def test_state_on_one_process_is_that_of_the_package(costs, tiny, name, small):
    optimizer, shapes = optimizer_of(costs, name, "8bit" if small else None)
    ranks = [costs.rank_of(name, tiny, shape, RANK / 32) for shape in shapes]
    expected = sum(
        shape.count * kept(costs, name, shape, rank, 1, small)
        for shape, rank in zip(shapes, ranks, strict=True)
    )
    assert predicted_bytes(optimizer) == state_bytes(optimizer) == expected


@pytest.mark.parametrize("name", OURS)
def test_shared_bases_are_those_of_the_package(costs, tiny, name):
    optimizer, _ = optimizer_of(costs, name)
    assert shared_bytes(optimizer) == costs.shared_bytes(name, tiny, share=RANK / 32)


def step_cut(rows, cols):
    """Return the bytes of a state whose basis is cut, and what two steps gather: the first learns.

    What is gathered counts as what a process gets.
    """
    mesh = mesh_of("fsdp-2")
    param = nn.Parameter(cut(torch.full((rows, cols), 0.1), mesh, [Shard(0)]))
    optimizer = GaLoreAdamW([param], rank=RANK, projector="power", shard_basis=True, side="right")
    found = []
    for step in range(2):
        grad = torch.randn(rows, cols, generator=torch.Generator().manual_seed(step))
        param.grad = cut(grad, mesh, [Shard(0)])
        found.append(counted(optimizer.step).total("all_gather"))
    assert predicted_bytes(optimizer) == state_bytes(optimizer)
    return state_bytes(optimizer), found


def test_bases_that_are_cut_are_those_of_the_package(costs, ranks):
    """What the first of two processes keeps; with 33 columns it gathers as many as for 34."""
    name, shape = "galore-cut", costs.Shape(48, 33)
    (first, gathers), (second, others) = ranks.run(2, step_cut, shape.rows, shape.cols)
    assert first == kept(costs, name, shape, RANK, 2)
    assert second == first - costs.basis_bytes(1, RANK, False)
    each = costs.update_traffic(name, 34, RANK).once
    whole, parts = (costs.refresh_traffic(kind, 34, RANK).once for kind in ("galore-power", name))
    assert gathers == others == [parts - whole + each, each]


@pytest.mark.parametrize("small", [False, True], ids=["float32", "8bit"])
def test_cut_bases_never_take_more_than_adamw(costs, small):
    """As the document says: about as large a share on any number of GPUs, and no floor."""
    for model in costs.MODELS:
        for gpus in [*range(1, 66), *(2**power + 1 for power in range(7, 19))]:
            taken = costs.state_bytes("galore-cut", model, gpus, small)
            assert taken < 0.42 * costs.state_bytes("adamw", model, gpus, small)


def test_adamw_is_that_of_torch(costs):
    param = nn.Parameter(torch.randn(48, 32))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert state_bytes(optimizer) == kept(costs, "adamw", costs.Shape(48, 32), RANK, 1)


def test_models_have_their_published_numbers_of_parameters(costs):
    """Those of 7B and 70B are published to the last one, that of 405B is rounded."""
    counts = {model.name: model.parameters for model in costs.MODELS}
    assert counts == {"7B": 6_738_415_616, "70B": 70_553_706_496, "405B": 405_853_388_800}


def test_shards_take_no_less_than_the_whole(costs):
    """The GPU with the most rows has at least its part, and fewer rows than GPUs cost one row."""
    shape = costs.Shape(48, 32)
    for name, method in costs.METHODS.items():
        for gpus in (3, 5, 48, 100):
            whole, part = (costs.sharded_bytes(name, shape, RANK, n, False) for n in (1, gpus))
            if method.basis == "cut":
                whole -= costs.basis_bytes(32, RANK, False)
                part -= costs.basis_bytes(-(-32 // gpus), RANK, False)
            assert part == -(-48 // gpus) * whole // 48


def test_refresh_is_spread_over_the_gap(costs):
    model = costs.MODELS[0]
    for name, method in costs.METHODS.items():
        mean = costs.step_traffic(name, model).payload
        most = costs.step_traffic(name, model, all_at_once=True).payload
        if method.learns in ("svd", "power"):
            each = sum(
                shape.count
                * costs.update_traffic(name, shape.cols, costs.rank_of(name, model, shape)).payload
                for shape in model.shapes
                if shape.projected
            )
            assert mean - each == pytest.approx((most - each) / costs.GAP)
        else:
            assert mean == most


def test_document_is_what_the_script_makes():
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_check_finds_a_number_that_was_changed(scaling, tmp_path, capsys):
    changed = tmp_path / "scaling.md"
    changed.write_text(scaling.DOC.read_text().replace("6,738,415,616", "6,738,415,617"))
    assert scaling.main(["--check", "--doc", str(changed)]) == 1
    assert "not what the script makes" in capsys.readouterr().out
    changed.write_text(scaling.written(changed.read_text()))
    assert scaling.main(["--check", "--doc", str(changed)]) == 0
    assert changed.read_text() == scaling.DOC.read_text()
