"""Does 7B fit: the plan is the arithmetic of the README, and every outcome gets its row."""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import sys

import pytest
import torch

from helpers.places import BENCHMARKS as FOLDER

pytestmark = pytest.mark.slow

GIB = 1 << 30


@pytest.fixture(scope="module")
def fit():
    """The two scripts, as modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("fit_7b"), importlib.import_module("fit_case")
    for name in ("fit_7b", "fit_case"):
        sys.modules.pop(name)


@pytest.fixture
def tiny(fit, monkeypatch):
    """A tiny case of each method, and text that is read once."""
    text = fit[1].load_corpus()
    monkeypatch.setattr(fit[1], "load_corpus", lambda: text)
    return {case.method: case for case in fit[0].cases(tiny=True)}


def run(fit, path, train, *more):
    """Exit status and rows of the script, with `train` in place of a process."""
    status = fit[0].main(["--tiny", "--out", str(path), *more], train)
    if not path.exists():
        return status, []
    with path.open(newline="") as file:
        return status, list(csv.DictReader(file))


def trained(case, limit):
    return {"outcome": "trained", "tokens_per_s": "1", "loss_first": "2", "loss_last": "1"}


@pytest.mark.parametrize("method", ["dct", "fira", "adamw", "adamw8bit"])
def test_every_method_trains_and_says_what_it_took(fit, tiny, method):
    if method == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="its 8-bit AdamW is bitsandbytes'")
    row = fit[1].run(tiny[method])
    assert (row["outcome"], row["phase"]) == ("trained", "")
    assert float(row["loss_last"]) < float(row["loss_first"])
    assert row["weight_bytes"] == 2 * (2 * 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 176 + 128) + 64)
    assert float(row["tokens_per_s"]) > 0
    needs = fit[0].needs("tiny", method, tiny[method].rank, tiny[method].length)
    # bitsandbytes' maps of 2 KiB are there once, and in the entry of each of the 16 matrices.
    assert row["state_bytes"] == needs.state + (15 * 2048 if method == "adamw8bit" else 0)


def test_weights_are_made_in_bf16_with_the_right_spread(fit):
    model = fit[1].build_model("tiny", "cpu")
    for name, param in model.named_parameters():
        assert param.dtype == torch.bfloat16
        if param.ndim == 2:
            assert param.float().std().item() == pytest.approx(0.02, rel=0.05), name
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize(("method", "phase"), [("adamw", "step"), ("dct", "backward")])
def test_memory_that_runs_out_is_a_row_with_its_phase(fit, tiny, monkeypatch, method, phase):
    """Ours steps in the backward pass, so that is where its step runs out of memory."""

    def out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 86 MiB")

    if method == "adamw":
        monkeypatch.setattr(torch.optim.AdamW, "step", out)
    else:
        monkeypatch.setattr("lowrank_optim.engine.step.Step.do", out)
    row = fit[1].run(tiny[method])
    assert (row["outcome"], row["phase"]) == ("out of memory", phase)
    assert row["message"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 86 MiB"
    assert "tokens_per_s" not in row
    assert "loss_last" not in row


def test_a_missing_package_and_a_wrong_loss_are_rows(fit, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    row = fit[1].run(tiny["adamw8bit"])
    assert (row["outcome"], row["phase"]) == ("not installed", "build")
    assert "bitsandbytes" in row["message"]
    monkeypatch.setattr(torch.Tensor, "item", lambda self: float("nan"))
    assert fit[1].run(tiny["adamw"])["outcome"] == "failed"


def test_rows_on_file_are_not_repeated_but_for_those_that_failed(fit, tmp_path):
    seen = []
    outcomes = {"dct": "trained", "fira": "failed", "adamw": "out of memory"}

    def train(case, limit):
        seen.append(case.method)
        return trained(case, limit) | {"outcome": outcomes.get(case.method, "not installed")}

    status, rows = run(fit, tmp_path / "a.csv", train)
    assert status == 1
    assert [row["outcome"] for row in rows] == [*outcomes.values(), "not installed"]
    outcomes.update(fira="trained", adamw8bit="trained")
    status, rows = run(fit, tmp_path / "a.csv", train)
    assert status == 0
    assert [row["outcome"] for row in rows] == ["trained", "trained", "out of memory", "trained"]
    assert seen == ["dct", "fira", "adamw", "adamw8bit", "fira", "adamw8bit"]


def test_the_budget_leaves_out_and_says_so(fit, tmp_path, capsys):
    status, rows = run(fit, tmp_path / "a.csv", trained, "--budget", "1")
    assert (status, rows) == (0, [])
    assert capsys.readouterr().out.count("left out, for want of time") == 4


def test_ours_is_tried_smaller_where_it_did_not_fit(fit, tmp_path, monkeypatch):
    case = fit[1].Case("tiny", "fira", 0, 256, 2, 32, 4)
    theirs = case._replace(method="adamw", rank=0)
    monkeypatch.setattr(fit[0], "cases", lambda tiny: [case, theirs])
    monkeypatch.setattr(fit[0], "predicted_peak", lambda case: 1)
    _, rows = run(fit, tmp_path / "a.csv", lambda *_: {"outcome": "out of memory"})
    tried = [(row["method"], row["rank"], row["batch"]) for row in rows]
    assert tried == [("fira", "256", "2"), ("fira", "256", "1"), ("fira", "128", "1"),
                     ("adamw", "0", "2")]  # fmt: skip


def test_a_process_that_dies_or_takes_too_long_is_a_row(fit, tiny, monkeypatch):
    died = subprocess.CompletedProcess([], -9, stdout="loading\n", stderr="out of luck\n")
    monkeypatch.setattr(fit[0].subprocess, "run", lambda *_, **__: died)
    row = fit[0].train(tiny["dct"], 5)
    assert row == {"outcome": "failed", "message": "exit status -9: out of luck"}

    def late(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(fit[0].subprocess, "run", late)
    assert fit[0].train(tiny["dct"], 5)["message"] == "stopped after 5 s"


@pytest.mark.long
def test_a_case_in_a_process_of_its_own(fit, tiny, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    row = fit[0].train(tiny["dct"], 300)
    assert (row["outcome"], row["device"]) == ("trained", "cpu"), row


@pytest.mark.long
def test_the_computed_table_of_the_readme_is_the_plan(fit):
    """Weights, states, what lies beside, and the sum, in GiB."""
    rows = re.findall(
        r"^\| (\w+) \| (\d+) GiB \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (FOLDER / "README.md").read_text(),
        re.M,
    )
    ours = [case for case in fit[0].cases(tiny=False) if case.method in fit[1].OURS]
    assert [(row[0].lower(), *map(int, row[1:4])) for row in rows] == [
        (case.method, case.card, case.rank, case.batch) for case in ours
    ]
    for case, row in zip(ours, rows, strict=True):
        parts = fit[0].planned_parts(case)
        states = parts.state + parts.basis
        found = [
            number / GIB for number in (states, parts.total - parts.weights - states, parts.total)
        ]
        assert [float(number) for number in row[4:]] == pytest.approx(found, abs=0.006)
        assert found[-1] < fit[1].cap_bytes(case.card) / GIB


def test_what_the_readme_says_of_adamw_and_of_larger_ranks_is_computed(fit):
    text = " ".join((FOLDER / "README.md").read_text().split())
    for said, method in (("AdamW would take", "adamw"), (", AdamW8bit", "adamw8bit")):
        found = re.search(rf"{said} ([\d.]+) (?:GiB at one text )?and ([\d.]+)", text)
        cases = [fit[1].Case("7b", method, 0, 0, batch) for batch in (1, 16)]
        peaks = [fit[0].predicted_peak(case) / GIB for case in cases]
        assert list(map(float, found.groups())) == pytest.approx(peaks, abs=0.06)
    sums = re.search(r"Nor does 512, at one text a step: ([\d.]+) and ([\d.]+) in all", text)
    cases = [fit[1].Case("7b", method, 16, 512, 1) for method in fit[1].OURS]
    peaks = [fit[0].predicted_peak(case) / GIB for case in cases]
    assert list(map(float, sums.groups())) == pytest.approx(peaks, abs=0.06)
    assert not any(fit[0].fits(case) for case in cases)
