"""The step benchmark runs, gate included, and writes nothing for what the gate refuses."""

import csv
import importlib
import sys
from dataclasses import replace

import pytest
import torch

from helpers.places import BENCHMARKS as FOLDER
from lowrank_optim import CondaW, FiraAdamW, GaLoreAdamW

OURS = ["galore", "dct-200", "dct-1", "fira", "frugal", "apollo", "plain"]


@pytest.fixture
def bench(monkeypatch):
    """The script with one tiny model and a small vocabulary; the machine's rates are not taken."""
    monkeypatch.syspath_prepend(str(FOLDER))
    step_time, peers = importlib.import_module("step_time"), importlib.import_module("peers")
    monkeypatch.setitem(peers.SIZES, "60m", (24, 40, 2))
    monkeypatch.setattr(peers, "VOCAB", 30)
    rates = {"copy_gb_s": 1.0, "matmul_tflops": 1.0, "device": "test", "threads": 1}
    monkeypatch.setattr(step_time, "facts", lambda device, dtype: rates)
    yield step_time, peers
    for name in ("step_time", "peers"):
        sys.modules.pop(name)


def run(step_time, path, *more):
    """Exit status and rows of a run."""
    common = ["--device", "cpu", "--rank", "8", "--repeats", "1", "--out", str(path)]
    status = step_time.main([*common, *more])
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


def kinds(rows, method):
    return [row["kind"] for row in rows if row["method"] == method]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_pass_the_gate_and_are_timed(bench, tmp_path, dtype):
    status, rows = run(bench[0], tmp_path / "a.csv", "--dtype", dtype, "--method", *OURS)
    assert status == 0
    assert kinds(rows, "adamw") == ["between"]
    assert kinds(rows, "plain") == ["first", "between"]
    assert kinds(rows, "dct-1") == ["first", "refresh", "with-refreshes"]
    for name in ("galore", "dct-200", "fira", "frugal", "apollo"):
        assert kinds(rows, name) == ["first", "between", "refresh", "with-refreshes"]
    for row in rows:
        assert float(row["ms"]) > 0
        assert float(row["ratio"]) > 0


def test_what_takes_an_svd_passes_the_gate_and_says_where_the_basis_is_from(bench, tmp_path):
    names = ["galore-torch", "fira-pypi", "conda"]
    status, rows = run(bench[0], tmp_path / "a.csv", "--method", *names)
    assert status == 0
    for name in names:
        assert kinds(rows, name) == ["first", "between", "refresh-per-matrix", "with-refreshes"]
        notes = {row["kind"]: row["note"] for row in rows if row["method"] == name}
        assert "QR" in notes["between"]


def test_a_red_gate_writes_no_row(bench, tmp_path, monkeypatch, capsys):
    """Fira that drops the rest of the gradient is not Fira."""
    step_time, peers = bench
    good = peers.METHODS["fira"].build

    def wrong(*sides, impl, **settings):
        build = good if impl == "eager" else peers.METHODS["galore"].build
        return build(*sides, impl="auto", **settings)

    broken = peers.Method("fira", wrong, ours=True, reads=2)
    monkeypatch.setitem(peers.METHODS, "fira", broken)
    status, rows = run(step_time, tmp_path / "a.csv", "--method", "fira", "frugal")
    assert status == 1
    assert {row["method"] for row in rows} == {"adamw", "frugal"}
    assert "gate is red: fira" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "cls", "settings"),
    [
        ("fira", FiraAdamW, {"projector": "power", "limiter": None}),
        ("galore", GaLoreAdamW, {"projector": "power", "on_refresh": "rotate"}),
        ("conda", CondaW, {"betas": (0.95, 0.99)}),
        ("conda", CondaW, {"projector": "power"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_sees_what_is_changed(bench, name, cls, settings, dtype):
    """A limiter, what becomes of moments, a beta, other directions in the same subspace."""
    peers = bench[1]
    good, bad = peers.METHODS[name].build, peers.ours(cls, **settings)

    def build(*sides, impl, **more):
        return (good if impl == "eager" else bad)(*sides, impl="auto", **more)

    assert peers.gate(peers.METHODS[name], dtype, "cpu", "float32", "auto") == ""
    assert peers.gate(peers.Method(name, build, ours=True), dtype, "cpu", "float32", "auto") != ""


def test_what_raises_gets_a_row_without_numbers(bench, tmp_path, monkeypatch):
    step_time, peers = bench

    def build(*sides, **settings):
        raise ImportError("no module of that name")

    monkeypatch.setitem(peers.METHODS, "apollo-torch", peers.Method("apollo-torch", build))
    status, rows = run(step_time, tmp_path / "a.csv", "--method", "apollo-torch")
    row = rows[0]
    assert status == 0
    assert (row["method"], row["kind"], row["ms"]) == ("apollo-torch", "none", "")
    assert "ImportError: no module of that name" in row["note"]


def test_conda_is_timed_at_full_rank(bench, tmp_path, monkeypatch):
    step_time, peers = bench
    conda, ranks = peers.METHODS["conda"], []

    def build(*sides, rank, gap, **settings):
        ranks.append(rank)
        return conda.build(*sides, rank=rank, gap=gap, **settings)

    monkeypatch.setitem(peers.METHODS, "conda", replace(conda, build=build))
    run(step_time, tmp_path / "a.csv", "--method", "conda")
    assert ranks == [peers.GATE_RANK] * 2 + [1.0] * 3


def test_the_budget_leaves_out_and_says_so(bench, tmp_path, capsys):
    _, rows = run(bench[0], tmp_path / "a.csv", "--method", "frugal", "--budget", "0")
    assert {row["method"] for row in rows} == {"adamw"}
    assert "frugal at 60m, rank 8" in " ".join(capsys.readouterr().out.split())


def test_floors_are_the_arithmetic_of_the_readme(bench):
    """AdamW on bf16 weights: 14 bytes a parameter, 22 with float32 states; projected 6 and more.

    CondaW's two states are as large as AdamW's, and three products have a basis of all columns.
    """
    peers = bench[1]
    problem = peers.Problem("60m", 1, torch.bfloat16, "cpu")
    plain, galore = peers.METHODS["plain"], peers.METHODS["galore"]
    assert peers.floor(peers.BASELINE, problem, 8, "bfloat16") == (14 * problem.params, 0)
    assert peers.floor(plain, problem, 8, "float32") == (22 * problem.params, 0)
    projected = sum(p.numel() for p in problem.matrices)
    moments = sum(max(p.shape) * 8 for p in problem.matrices)
    rest = problem.params - projected
    total = 6 * projected + 16 * moments + 22 * rest
    assert peers.floor(galore, problem, 8, "float32") == (total, 4 * 8 * projected)
    wide = sum(min(p.shape) * p.numel() for p in problem.matrices)
    conda = peers.METHODS["conda"]
    assert peers.floor(conda, problem, 8, "float32") == (22 * problem.params, 3 * 2 * wide)
