"""Swaps at AdamW's own rates: what is run, on which text, and what the tables make of it."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest

from helpers.places import BENCHMARKS as FOLDER

sys.path.insert(0, str(FOLDER))

from pretraining import data, methods, tasks, train, tune
from pretraining.ledger import Ledger, spec_of

transfer = importlib.import_module("transfer")
swaps = importlib.import_module("reporting.swaps")
figures = importlib.import_module("reporting.figures")

pytestmark = pytest.mark.slow

ASKED = ["--task", "smoke", "--methods", "adamw,normuon,galore", "--seeds", "0", "1"]


def loss_of(spec):
    """A made-up loss: AdamW is best at 3e-3, NorMuon below it, GaLore above it."""
    offset = {"adamw": 0.0, "normuon": -0.25, "galore": 0.125}[spec.method]
    longer = 0.0 if "scale=2.0" in spec.change else 0.0625
    return 2 + offset + abs(np.log10(spec.lr / 3e-3)) + longer + spec.seed % 100 / 64


def made(ledger, phase, *more):
    """Follow a phase's plans, with made-up losses in place of runs; return the new runs."""
    args, known, new = transfer.parse([phase, *ASKED, *more]), ledger.losses(), []
    for plan in transfer.PHASES[phase](ledger, args):
        loss = None
        while True:
            try:
                spec = next(plan) if loss is None else plan.send(loss)
            except StopIteration:
                break
            loss = known.get(spec, loss_of(spec))
            if spec not in known:
                result = train.Result(spec, loss, [(12, 2.0, loss)], 1, 1, 0.0, 0, "text")
                ledger.add(result, "cpu", 1, {"torch": "2", "commit": "c", "date": "d"})
                known[spec] = loss
                new.append(spec)
    return new


@pytest.fixture
def ledger(tmp_path):
    """A ledger with AdamW's search and its final seeds."""
    found = Ledger(tmp_path / "transfer.csv")
    made(found, "adamw")
    return found


def test_adamw_is_searched_then_run_at_its_best(ledger):
    runs = [spec_of(row) for row in ledger.rows()]
    searched = [spec for spec in runs if spec.split == "tune"]
    assert len(searched) == transfer.POINTS
    assert (searched[0].lr, searched[0].rest_lr, searched[0].beta2) == (1.7e-3, 0.03, 0.999)
    assert [(spec.lr, spec.seed) for spec in runs[len(searched) :]] == [(3e-3, 0), (3e-3, 1)]
    assert made(ledger, "adamw") == []


def test_another_length_begins_at_the_rates_of_the_first(ledger):
    longer = made(ledger, "adamw", "--steps", "24", "--near", "smoke", "--points", "3")
    assert [spec.lr for spec in longer if spec.split == "tune"] == [3e-3, 5.5e-3, 1.7e-3]
    assert {spec.steps for spec in longer} == {24}


def test_rates_can_be_those_of_another_length(ledger):
    runs = made(ledger, "sweep", "--steps", "48", "--rates-of", "12", "--factors", "1")
    assert {(spec.steps, spec.lr, spec.rest_lr) for spec in runs} == {(48, 3e-3, 0.03)}
    found = swaps.Found(ledger).references
    assert list(found) == ["smoke, 12", "smoke, 48, rates of 12"]
    assert [spec.steps for spec in found.values()] == [12, 48]


def test_nothing_is_swapped_before_adamw_is_tuned(tmp_path):
    with pytest.raises(LookupError, match="smoke adamw: no rates were tuned"):
        made(Ledger(tmp_path / "none.csv"), "swap")


def test_a_swap_keeps_rates_betas_and_decay(ledger):
    like = transfer.reference(ledger, "smoke", None)
    runs = made(ledger, "swap")
    kept = ("task", "split", "steps", "lr", "rest_lr", "beta1", "beta2", "weight_decay", "state")
    for spec in runs:
        assert all(getattr(spec, key) == getattr(like, key) for key in kept)
        assert spec.rank == methods.METHODS[spec.method].rank
    asked = {(spec.method, spec.change, spec.seed) for spec in runs}
    changes = ('length="published"', 'length="rms", scale=1.0', 'length="adamw", scale=1.0')
    assert asked == {
        (name, change, seed)
        for name in ("normuon", "galore") for change in changes for seed in (0, 1)
    }  # fmt: skip
    assert len(runs) == len(asked)
    assert [spec.seed for spec in runs] == sorted(spec.seed for spec in runs)


def test_scales_change_the_length_and_adamws_rate(ledger):
    made(ledger, "swap", "--lengths", "adamw")
    runs = made(ledger, "scales", "--scales", "1", "2")
    assert {(spec.method, spec.lr, spec.rest_lr, spec.change) for spec in runs} == {
        ("adamw", 6e-3, 0.03, ""),
        ("normuon", 3e-3, 0.03, 'length="adamw", scale=2.0'),
        ("galore", 3e-3, 0.03, 'length="adamw", scale=2.0'),
    }


def test_a_sweep_moves_both_rates(ledger):
    runs = made(ledger, "sweep", "--factors", "0.5", "1")
    assert {(spec.lr, spec.rest_lr) for spec in runs} == {(1.5e-3, 0.015), (3e-3, 0.03)}
    assert {spec.lr for spec in runs if spec.method == "adamw"} == {1.5e-3}


def test_each_condition_changes_one_thing(ledger):
    like = transfer.reference(ledger, "smoke", None)
    found = {name: change(like) for name, change in transfer.CONDITIONS.items()}
    assert len({*found.values(), like}) == len(found) + 1
    assert found["decay"] == like._replace(weight_decay=0.1)
    assert found["rates x 3"] == like._replace(lr=9e-3, rest_lr=0.09)
    assert tasks.TASKS[found["clip"].task].clip == 1.0
    assert tasks.TASKS["bytes-128+clip"].clip is None
    assert tasks.TASKS[found["batch"].task].batch == 4 * tasks.TASKS["smoke"].batch
    made(ledger, "conditions", "--conditions", "decay")
    assert made(ledger, "conditions", "--conditions", "decay") == []


def test_own_rates_are_sought_with_the_published_length(ledger):
    runs = made(ledger, "own", "--points", "3")
    assert {spec.change for spec in runs} == {'length="published"'}
    assert len(runs) == 2 * (3 + 2)


def test_the_stable_schedule_rises_stays_and_falls_to_a_tenth():
    shares = [tasks.stable(step, 100) for step in range(100)]
    assert shares[0] == 0.1
    assert shares[9:81] == [1.0] * 72
    assert shares[90] == pytest.approx(0.55)
    assert shares[99] == pytest.approx(0.145)
    assert tasks.stable(100, 100) == 0.1


def test_tables_show_what_was_measured_and_nothing_else(ledger, monkeypatch):
    monkeypatch.setattr(swaps, "LEDGER", ledger)
    monkeypatch.setattr(swaps, "SWEPT", ("smoke", 12))
    show = {name: lambda name=name: swaps.TABLES[name](ledger) for name in swaps.TABLES}
    assert all(text() == "Not measured yet." for text in show.values())
    made(ledger, "swap", "--lengths", "adamw")
    made(ledger, "own", "--points", "2", "--methods", "galore")
    made(ledger, "scales", "--scales", "2", "3")
    made(ledger, "sweep", "--factors", "0.5", "2")
    made(ledger, "conditions", "--conditions", "decay")
    table = show["transfer-swap"]().splitlines()
    assert len(table) == 2 + 3 + 2
    assert table[2].startswith(
        "| AdamW | smoke, 12 | - | - | - | - | 2.070 (2.062 - 2.078) | 0.003"
    )
    mean = (2.1875 / 2.0625 + 2.203125 / 2.078125) / 2 - 1
    assert f"| GaLore | smoke, 12 | - | - | 2.195 (2.188 - 2.203) | {mean:+.1%} (" in table[3]
    assert table[4].startswith("| NorMuon | smoke, 12 |")
    assert table[4].endswith("| - | - |")
    assert "Text text, CPU" in table[-1]
    ranked = [line.split(" | ")[0] for line in show["transfer-directions"]().splitlines()[2:5]]
    assert ranked == ["| NorMuon", "| AdamW", "| GaLore"]
    for line in show["transfer-scales"]().splitlines()[3:5]:
        cells = line.split(" | ")
        assert (cells[2], cells[4], cells[7]) == ("-", "-", "2")
    assert show["transfer-sweep"]().splitlines()[2].endswith("| 1 |")
    assert show["transfer-conditions"]().splitlines()[3].count(" - ") >= 5
    content = swaps.sweep_content(ledger)
    assert list(content["methods"]) == ["adamw", "galore", "normuon"]
    assert [factor for factor, _ in content["methods"]["normuon"]["points"]] == [0.5, 1, 2]


def test_what_is_compared_has_the_same_seeds(ledger, monkeypatch):
    monkeypatch.setattr(swaps, "LEDGER", ledger)
    made(ledger, "swap", "--lengths", "adamw")
    made(ledger, "scales", "--scales", "2", "--methods", "normuon", "--seeds", "1")
    line = swaps.TABLES["transfer-scales"](ledger).splitlines()[2]
    assert line.startswith("| NorMuon | smoke, 12 | - | 1.828 | - | 1.766 | - | 2 |")
    assert swaps.alike([None, None]) == [None, None]


def test_the_figure_is_drawn_with_and_without_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="it draws a figure")
    figure = figures.FIGURES["transfer.png"]
    shown = {"normuon": {"label": "NorMuon", "points": [[0.5, 2.0], [1, 1.5], [2, 1.75]]}}
    for methods_shown in ({}, shown):
        content = {"task": "smoke", "steps": 12, "methods": methods_shown}
        figures.save(figure, content, tmp_path / "t.png")
        assert figures.hash_in(tmp_path / "t.png") == figures.hash_of(content)
    assert set(figures.COLOURS) == set(methods.METHODS)


@pytest.fixture
def folder(tmp_path_factory):
    """A standard library of little texts, with what builds and distributions add."""
    root = tmp_path_factory.mktemp("lib") / "python3"
    (root / "json").mkdir(parents=True)
    (root / "site-packages").mkdir()
    names = [f"json/file{number}.py" for number in range(120)]
    for number, name in enumerate([*names, "_sysconfigdata_x.py", "LICENSE.txt", "zipapp.py"]):
        words = " ".join(str((number + 1) * place % 131) for place in range(400))
        (root / name).write_text(f"Text {number}\n{words}\n")
    return root


def test_the_text_of_the_standard_library_has_nothing_of_the_machine(folder):
    read = [name for name, _ in data.standard(data.read([folder]))]
    assert len(read) == 121
    assert {"python3/zipapp.py", "python3/json/file7.py"} < set(read)
    _, manifest = data.prepare([folder], 256, 2 << 20, "stdlib")
    assert "packages" not in manifest
    assert sum(manifest[split]["files"] for split in data.SPLITS) == 121
    assert len(data.roots("stdlib")) == 1
    assert data.roots("machine")[:1] == data.roots("stdlib")


@pytest.mark.long
def test_everything_end_to_end_and_nothing_twice(folder, tmp_path):
    arrays, manifest = data.prepare([folder], 256, 2 << 20, "stdlib")
    arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    work, path = tmp_path / "work", tmp_path / "transfer.csv"
    work.mkdir()
    np.savez(work / "text-stdlib-256-2.npz", **arrays)
    shutil.copy(work / "text-stdlib-256-2.npz", work / "text-256-2.npz")
    names = ["adamw", *(name for name in methods.METHODS if name != "adamw")]
    options = ["--results", str(path), "--work", str(work), "--seeds", "0", "--points", "2"]
    asked = ["--task", "smoke", *options, "--methods", ",".join(names), "--lengths", "adamw"]
    phases = ["adamw", "swap", "scales", "conditions"]
    few = ["--scales", "2", "--conditions", "stable", "clip"]
    assert transfer.main([*phases, *asked, *few, "--budget", "0"]) == 1
    assert transfer.main([*phases, *asked, *few]) == 0
    rows = Ledger(path).rows()
    assert len(rows) == 2 + len(names) * (1 + 1 + 2)
    assert all(0 < float(row["loss"]) < 6 for row in rows)
    assert {row["text"] for row in rows} == {manifest["train"]["sha256"][:12]}
    assert json.loads((tmp_path / "transfer_text.json").read_text())["smoke"] == manifest
    assert transfer.main([*phases, *asked, *few]) == 0
    assert Ledger(path).rows() == rows
    assert tune.measured(Ledger(path), tune.base("smoke", "adamw"))
