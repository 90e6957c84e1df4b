"""The tables of docs/scaling.md are what its script makes, and its formulas are the package's."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_optim import (
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    predicted_bytes,
    state_bytes,
)
from lowrank_optim.memory import shared_bytes

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"
RANK = 8
OURS = {
    "galore": (GaLoreAdamW, {}),
    "galore-power": (GaLoreAdamW, {"projector": "power"}),
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


def optimizer_of(scaling, name, state_dtype=None):
    """An optimizer after a step, and the shapes of its parameters: matrices, and what is plain."""
    shapes = [(scaling.Shape(48, 32, 2), True), (scaling.Shape(24, 40), True)]
    shapes += [(scaling.Shape(160, 33, 1, projected=False), False)]
    shapes += [(scaling.Shape(37, 1, 3, projected=False), False)]
    groups = {True: [], False: []}
    for shape, projected in shapes:
        size = (shape.rows, shape.cols) if shape.cols > 1 else (shape.rows,)
        groups[projected] += [nn.Parameter(torch.randn(size)) for _ in range(shape.count)]
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
    return optimizer, [shape for shape, _ in shapes]


@pytest.mark.parametrize("small", [False, True], ids=["float32", "8bit"])
@pytest.mark.parametrize("name", OURS)
def test_state_on_one_process_is_that_of_the_package(scaling, name, small):
    optimizer, shapes = optimizer_of(scaling, name, "8bit" if small else None)
    expected = sum(
        shape.count
        * (
            scaling.sharded_bytes(name, shape, RANK, 1, small)
            + scaling.replicated_bytes(name, shape, RANK, small)
        )
        for shape in shapes
    )
    assert predicted_bytes(optimizer) == state_bytes(optimizer) == expected


@pytest.mark.parametrize("name", OURS)
def test_shared_bases_are_those_of_the_package(scaling, name):
    optimizer, _ = optimizer_of(scaling, name)
    model = scaling.Model("tiny", 32, 40, 1, 4, 2, 50)
    assert shared_bytes(optimizer) == scaling.shared_bytes(name, model, share=RANK / 32)


def test_adamw_is_that_of_torch(scaling):
    param = nn.Parameter(torch.randn(48, 32))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    shape = scaling.Shape(48, 32)
    kept = scaling.sharded_bytes("adamw", shape, RANK, 1, False)
    assert state_bytes(optimizer) == kept + scaling.replicated_bytes("adamw", shape, RANK, False)


def test_models_have_their_published_numbers_of_parameters(scaling):
    """Those of 7B and 70B are published to the last one, that of 405B is rounded."""
    counts = {model.name: model.parameters for model in scaling.MODELS}
    assert counts == {"7B": 6_738_415_616, "70B": 70_553_706_496, "405B": 405_853_388_800}


def test_shards_take_no_less_than_the_whole(scaling):
    """The GPU with the most rows has at least its part, and fewer rows than GPUs cost one row."""
    for name in scaling.METHODS:
        whole = scaling.sharded_bytes(name, scaling.Shape(48, 32), RANK, 1, False)
        for gpus in (3, 5, 48, 100):
            part = scaling.sharded_bytes(name, scaling.Shape(48, 32), RANK, gpus, False)
            assert part == -(-48 // gpus) * whole // 48


def test_refresh_is_spread_over_the_gap(scaling):
    model = scaling.MODELS[0]
    for name, method in scaling.METHODS.items():
        mean = scaling.step_traffic(name, model).payload
        most = scaling.step_traffic(name, model, all_at_once=True).payload
        if method.learns in ("svd", "power"):
            assert most / scaling.GAP <= mean < 1.01 * most / scaling.GAP
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
