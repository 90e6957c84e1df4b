"""Every benchmark runs from its command line to what it writes, as small as it gets."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from helpers.places import BENCHMARKS as FOLDER
from helpers.places import TESTS
from lowrank_optim.demo.corpus import load_corpus
from lowrank_optim.demo.train import Settings

pytestmark = pytest.mark.slow

ELSEWHERE = {
    "fit_7b": "test_fit_7b.py",
    "house_recipe": "test_pretraining.py",
    "kill_resume": "test_kill_resume.py",
    "pretrain": "test_pretraining.py",
    "pretrain_time": "test_pretraining.py",
    "scaling": "test_scaling.py",
    "step_time": "test_benchmarks.py",
    "transfer": "test_transfer.py",
}
"""Scripts that other files run from end to end; here, `test_NAME` does."""


@dataclass(frozen=True)
class Tiny(Settings):
    """A run of seconds, on the same kind of model."""

    steps: int = 3
    batch: int = 2
    length: int = 16
    rank: int | float = 8
    hidden: int = 32
    intermediate: int = 64
    layers: int = 1
    heads: int = 2
    curve_windows: int = 2
    windows: int = 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of little texts."""
    root = tmp_path_factory.mktemp("texts")
    for number in range(120):
        words = " ".join(str(number * place % 97) for place in range(400))
        (root / f"file{number}.md").write_text(f"Text {number}\n{words}\n")
    return root


@pytest.fixture
def script(texts, monkeypatch):
    """Import a script, with a tiny model and the little texts in place of the demo's."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        module = importlib.import_module(name)
        for key, value in (("Settings", Tiny), ("load_corpus", partial(load_corpus, texts))):
            if hasattr(module, key):
                monkeypatch.setattr(module, key, value)
        return module

    return load


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def forbidden(*_, **__):
    raise AssertionError("what is on file was done again")


def assert_a_loss(value):
    """In nats a byte, about what guessing at random costs or less."""
    assert 1 < float(value) < 1.1 * math.log(256)


def test_tune_demo(script, tmp_path, monkeypatch, capsys):
    tune_demo, path = script("tune_demo"), tmp_path / "tune.csv"
    command = ["--methods", "adamw,galore", "--points", "2", "--results", str(path)]
    tune_demo.main(command)
    rows = rows_of(path)
    assert list(rows[0]) == list(tune_demo.FIELDS)
    assert [row["method"] for row in rows] == ["adamw", "adamw", "galore", "galore"]
    assert len({(row["method"], row["lr"], row["rest_lr"]) for row in rows}) == 4
    for row in rows:
        assert (row["steps"], row["seed"]) == ("3", "1")
        assert_a_loss(row["val_loss"])
    monkeypatch.setattr(tune_demo, "train", forbidden)
    capsys.readouterr()
    tune_demo.main(command)
    assert rows_of(path) == rows
    best = re.findall(r"^(\w+): lr .*\(2 runs, on the edge of", capsys.readouterr().out, re.M)
    assert best == ["adamw", "galore"]


def test_demo_seeds(script, tmp_path, monkeypatch):
    demo_seeds, path = script("demo_seeds"), tmp_path / "new" / "seeds.csv"
    command = ["--methods", "adamw,muon", "--seeds", "0", "1", "--results", str(path)]
    demo_seeds.main(command)
    rows = rows_of(path)
    assert list(rows[0]) == list(demo_seeds.FIELDS)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("adamw", "0"), ("muon", "0"), ("adamw", "1"), ("muon", "1"),
    ]  # fmt: skip
    for row in rows:
        assert_a_loss(row["val_loss"])
    monkeypatch.setattr(demo_seeds, "train", forbidden)
    demo_seeds.main(command)
    assert rows_of(path) == rows


def test_refresh(script, tmp_path, monkeypatch):
    refresh, path = script("refresh"), tmp_path / "new" / "refresh.csv"
    changed = {"SMALL": Tiny(steps=24, layers=2), "BIG": Tiny(steps=2), "BIG_RANK": 4, "EVERY": 3}
    for name, value in {**changed, "RANKS": (4, 8)}.items():
        monkeypatch.setattr(refresh, name, value)
    refresh.main(["--device", "cpu", "--results", str(path)])
    rows = rows_of(path)
    assert len(rows) == 2 * 4 * len(refresh.SMALL_PARTS) + 2 * len(refresh.BIG_PARTS)
    assert {row["step"] for row in rows} == {"0", "20", "23", "1"}
    for row in rows:
        warm = row["start"] == "warm"
        assert 0 < float(row["best_share"]) <= 1
        assert 0.5 < float(row["energy"]) <= 1.0001
        assert bool(row["energy_before"]) == bool(row["diagonal"]) == warm
        assert not warm or float(row["energy_before"]) <= 1.0001
        assert min(float(row["power_ms"]), float(row["times_faster"])) > 0
    refresh.main(["--device", "cpu", "--no-big", "--results", str(path)])
    assert len(rows_of(path)) == 2 * 4 * len(refresh.SMALL_PARTS)


def test_eightbit_moments(script, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="two candidates are bitsandbytes' own")
    moments, path = script("eightbit_moments"), tmp_path / "new" / "moments.csv"
    for name, value in (("BLOCKS", 1), ("STEPS", 100), ("WARMUP", 60), ("MARKS", (20, 40))):
        monkeypatch.setattr(moments, name, value)
    moments.main(["--results", str(path)])
    rows = rows_of(path)
    assert list(rows[0]) == moments.FIELDS
    named = [(row["gradients"], row["candidate"]) for row in rows]
    assert named == [(kind, name) for kind in moments.KINDS for name in moments.CANDIDATES]
    for row in rows:
        changes = moments.KINDS[row["gradients"]][0] is moments.changed
        for field in moments.FIELDS[2:]:
            tracked = field in moments.TRACKED
            assert math.isfinite(float(row[field])) if changes or not tracked else not row[field]
    errors = {name: float(row["n_error"]) for name, row in zip(named, rows, strict=True)}
    for kind in ("scales 1e-3..1", "scales 1e-6..1"):
        assert errors[kind, "a V"] > 10 * errors[kind, "e, floor at code 6"]


def test_state_quality(script, tmp_path):
    quality, path = script("state_quality"), tmp_path / "states.csv"
    quality.main(["--methods", "galore,fira", "--seeds", "0", "1", "--results", str(path)])
    rows = rows_of(path)
    assert list(rows[0]) == list(quality.FIELDS)
    assert len({(row["method"], row["state_dtype"], row["seed"]) for row in rows}) == 2 * 3 * 2
    for row in rows:
        assert_a_loss(row["val_loss"])
    for method in ("galore", "fira"):
        sizes = [int(row["state_bytes"]) for row in rows if row["method"] == method]
        assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] == sizes[5]


def test_bf16_weights(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="it draws a figure")
    weights, path, figure = script("bf16_weights"), tmp_path / "w.csv", tmp_path / "w.png"
    monkeypatch.setattr(weights, "TASKS", {"demo": Tiny(), "continue": Tiny(steps=2)})
    command = f"--methods adamw,fira --seeds 0 --results {path} --figure {figure}".split()
    weights.main([*command, "--tasks", "demo"])
    first = rows_of(path)
    assert len(first) == 2 + 3
    weights.main(command)
    rows = rows_of(path)
    assert [row for row in rows if row["task"] == "demo"] == first
    assert len({tuple(row[key] for key in weights.Key._fields) for row in rows}) == 2 * (2 + 3)
    for row in rows:
        assert list(row) == list(weights.FIELDS)
        assert row["steps"] == ("3" if row["task"] == "demo" else "2")
        assert_a_loss(row["start_loss"])
        assert_a_loss(row["val_loss"])
        assert row["start_loss"] != row["val_loss"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    figure.unlink()
    for name in ("run", "pretrain"):
        monkeypatch.setattr(weights, name, forbidden)
    weights.main(command)
    assert rows_of(path) == rows
    assert figure.exists()


@pytest.fixture
def work(script, texts, tmp_path):
    """A folder with the tokens of the task "smoke"."""
    data = script("pretraining.data")
    arrays, manifest = data.prepare([texts], 256, 2 << 20)
    arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    folder = tmp_path / "work"
    folder.mkdir()
    np.savez(folder / "text-256-2.npz", **arrays)
    return folder


def a_ledger(script, path, *methods, task="smoke", text="none"):
    """A ledger that holds one run of a search for some methods, and a final one."""
    ledger, tune = script("pretraining.ledger").Ledger(path), script("pretraining.tune")
    result = script("pretraining.train").Result
    for method in methods:
        spec = tune.base(task, method)
        for kind in (spec, spec._replace(split="final", seed=0)):
            run = result(kind, 1.5, [(1, 2.0, 1.5)], 1 << 20, 1, 0.0, 0, text)
            ledger.add(run, "cpu", 1, {})
    return ledger


@pytest.mark.long
def test_sensitivity(script, work, tmp_path, monkeypatch):
    sensitivity, path = script("sensitivity"), tmp_path / "pretrain.csv"
    text = script("pretraining.data").load(256, 2 << 20, work).name
    ledger = a_ledger(script, path, "lowrank", text=text)
    known = ledger.rows()
    for name, value in (("RANKS", (0.25, 0.5)), ("GAPS", (5,)), ("STEPS", (0, 2))):
        monkeypatch.setattr(sensitivity, name, value)
    command = f"--task smoke --methods lowrank --results {path} --work {work}".split()
    assert sensitivity.main([*command, "--budget", "0"]) == 1
    assert ledger.rows() == known
    assert sensitivity.main(command) == 0
    added, best = ledger.rows()[len(known) :], float(known[0]["lr"])
    settings = {(row["lr"] == str(best), row["rank"], row["gap"]) for row in added}
    around = {(at, "0.5", "50") for at in (True, False)} | {(False, "0.25", "50")}
    assert settings == around | {(at, "0.25", "5") for at in (True, False)}
    assert len(added) == len(settings)
    for row in added:
        assert_a_loss(row["loss"])
        assert (row["split"], row["steps"]) == ("tune", "12")
        assert best <= float(row["lr"]) < 3.5 * best
    assert sensitivity.main(command) == 0
    assert ledger.rows() == known + added


def test_report(script, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="it draws a figure")
    report, path = script("report"), tmp_path / "pretrain.csv"
    for name in report.DOCS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Before.\n<!-- report: quality-3m -->\n<!-- end -->\nAfter.\n")
    command = ["--root", str(tmp_path), "--results", str(path)]
    assert report.main([*command, "--check"]) == 1
    stale = len(report.DOCS) + len(report.figures.FIGURES)
    assert capsys.readouterr().out.count("not what the results say") == stale
    for measured in (False, True):
        if measured:
            a_ledger(script, path, "adamw", "galore", task="3m")
            assert report.main([*command, "--check"]) == 1
        assert report.main(command) == 0
        assert report.main([*command, "--check"]) == 0
        for name in report.DOCS:
            text = (tmp_path / name).read_text()
            assert re.fullmatch(r"Before\.\n<!--.*-->\n.+\n<!-- end -->\nAfter\.\n", text, re.S)
            assert ("| AdamW | 1.500 |" in text) == measured
    for name in report.figures.FIGURES:
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_host_time(script, tmp_path, monkeypatch):
    host_time, path = script("host_time"), tmp_path / "new" / "host.csv"
    monkeypatch.setattr(host_time, "LISTS", {"two": ([(24, 16), (9, 40), (5,)], 1.5)})
    rates = {"copy_gb_s": 1.0, "matmul_tflops": 1.0, "threads": 1}
    monkeypatch.setattr(host_time, "facts", lambda device, dtype: rates)
    assert host_time.main(["--rounds", "2", "--imports", "1", "--out", str(path)]) == 0
    rows = rows_of(path)
    assert list(rows[0]) == host_time.FIELDS
    steps, traces, imports = (
        [row for row in rows if row["kind"] == kind] for kind in ("step", "trace", "import")
    )
    assert {row["optimizer"]: row["target"] for row in steps} == {
        "adamw, loop": "", "adamw, fused": "", "galore": "1.5",
    }  # fmt: skip
    assert {row["subject"] for row in imports} == {"torch", "lowrank_optim"}
    for row in (*steps, *imports):
        assert 0 < float(row["ms"]) <= float(row["ms_median"])
    assert [row["ratio"] for row in steps if row["optimizer"] == "adamw, loop"] == ["1.000"]
    plain, kernels = traces
    assert 1 < int(plain["files"]) <= int(plain["changes"]) <= int(plain["calls"])
    assert bool(kernels["note"]) != bool(kernels["files"])


def test_length_cost(script, tmp_path, monkeypatch):
    length_cost, path = script("length_cost"), tmp_path / "cost.csv"
    monkeypatch.setitem(length_cost.SIZES, "60m", (24, 40, 1))
    monkeypatch.setattr(script("peers"), "VOCAB", 30)
    rates = {"copy_gb_s": 1.0, "matmul_tflops": 1.0, "threads": 1}
    monkeypatch.setattr(length_cost, "facts", lambda device, dtype: rates)
    command = ["--rank", "8", "--repeats", "2", "--layers", "1", "--out", str(path)]
    assert length_cost.main([*command, "--methods", "galore", "muon"]) == 0
    rows = rows_of(path)
    assert list(rows[0]) == length_cost.FIELDS
    assert [(row["method"], row["length"]) for row in rows] == [
        (name, length) for name in ("galore", "muon") for length in length_cost.LENGTHS
    ]
    states = {(row["method"], row["length"]): int(row["state_bytes"]) for row in rows}
    for name in ("galore", "muon"):
        assert states[name, "published"] == states[name, "rms"] < states[name, "adamw"]
    assert all(float(row["ms_min"]) > 0 for row in rows)


def test_sample_size(script, work, tmp_path, monkeypatch):
    sample_size, path = script("sample_size"), tmp_path / "sizes.csv"
    monkeypatch.setattr(sample_size, "facts", lambda device, dtype: {"threads": 1})
    options = ["--sizes", "64", "4096", "--losses", "64", "--out", str(path), "--work", str(work)]
    assert sample_size.main(["--task", "smoke", *options]) == 0
    few, many, trained = rows_of(path)
    assert float(few["error"]) > float(many["error"]) == 0.0  # all entries of these matrices
    assert float(few["error_95"]) >= float(few["error"])
    assert (trained["kind"], trained["entries"]) == ("loss", "64")
    assert_a_loss(trained["loss"])


def test_sweep_models(script, capsys):
    sweep = script("sweep_models")
    sweep.main(["--library", "transformers", "--only", "^(rwkv|resnet)$"])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("transformers: classes 5, built 5, sorted 5, alike by names alone 5,")
    sweep.main(["--library", "transformers", "--only", "^rwkv$", "--names"])
    assert "rwkv" not in capsys.readouterr().out  # all that is projected stands in layers


def test_least_axis(script, capsys):
    small = ["--axes", "8", "--steps", "2", "--seeds", "2", "--width", "16"]
    script("least_axis").main([*small, "--methods", "AdamW", "GaLore"])
    before, header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert before[:2] == ["before", "adapters:"]
    assert header[0] == "axis"
    assert [row[:2] for row in rows] == [["8", "AdamW"], ["8", "GaLore"]]
    assert int(rows[0][-1]) > 1.5 * int(rows[1][-1])


@pytest.mark.long
def test_compiled():
    """In a process of its own: the kernels of this one may be interpreted."""
    pytest.importorskip("triton", reason="kernels need triton")
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for CUDA")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = [str(FOLDER / "compiled.py"), "--arch", "80", "--only", "codes signed", "--jobs", "1"]
    command = [sys.executable, "-W", "ignore", *script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    found = {row[1].strip(): [cell.strip() for cell in row[2:-1]] for row in cells}
    assert set(found) == {"_quantize", "_dequantize"}
    for variant, arch, registers, stack, *_ in found.values():
        assert (variant, arch, stack) == ("signed", "80", "0")
        assert 0 < int(registers) <= 255


def scripts():
    """Names of the scripts: the files with a function `main`."""
    trees = {path.stem: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}
    return {
        name
        for name, tree in trees.items()
        if any(isinstance(part, ast.FunctionDef) and part.name == "main" for part in tree.body)
    }


def test_every_script_is_run_by_a_test():
    here = {name for name in scripts() if f"test_{name}" in globals()}
    assert here | set(ELSEWHERE) == scripts()
    for name, file in ELSEWHERE.items():
        text = next(TESTS.glob(f"*/{file}")).read_text()
        assert re.search(rf'"{name}(\.py)?"|import {name}\b', text), name
        assert re.search(r"\.main\(", text), file


def test_every_script_is_described():
    table = (FOLDER / "README.md").read_text().partition("\n\n## ")[0]
    described = re.findall(r"^\| `(\w+)\.py` \| \S.* \| \S.* \|$", table, re.M)
    assert sorted(described) == sorted(scripts())
