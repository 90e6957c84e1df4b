"""The kill benchmark passes with a few kills, and fails where a resume is wrong."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import subprocess
import sys

import pytest

from helpers.places import ROOT

pytestmark = pytest.mark.slow

SEED = "94730"
"""Two kills in 60 steps, all between steps 6 and 36: after a checkpoint, long before the end."""
COMMON = """
import json, sys, torch
import kill_resume
from lowrank_optim import LowRank

def without_moments(optimizer, saved, right=LowRank.load_state_dict):
    right(optimizer, saved)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()

def run(name, loops, presets):
    path = f"{sys.argv[1]}/{name}.csv"
    common = ["--kills", "2", "--steps", "60", "--seed", sys.argv[2]]
    status = kill_resume.main(["--loops", loops, "--presets", presets, "--out", path, *common])
    statuses[name] = status

def with_fault(name, loop, preset, owner, attribute, wrong):
    right = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    run(name, loop, preset)
    setattr(owner, attribute, right)

statuses = {}
"""
BY_HAND = """
class Forgetful(torch.Generator):
    def set_state(self, state):
        return self

def one_step_older(path, right=torch.load, **settings):
    saved = right(path, **settings)
    return {**saved, "step": saved["step"] - 1}

run("plain", "plain", "fira")
run("flat", "flat", "galore-8bit-bf16")
with_fault("no moments", "plain", "galore", LowRank, "load_state_dict", without_moments)
with_fault("another dropout", "plain", "apollo", torch, "set_rng_state", lambda state: None)
with_fault("another order", "flat", "frugal", torch, "Generator", Forgetful)
with_fault("an older step", "plain", "dct", torch, "load", one_step_older)
print(json.dumps(statuses))
"""
FRAMEWORKS = """
from transformers import Trainer

nothing = lambda *_: None
run("frameworks", "trainer,lightning", "fira")
with_fault("dropout of trainer", "trainer", "apollo", Trainer, "_load_rng_state", nothing)
with_fault("dropout of lightning", "lightning", "apollo", torch, "set_rng_state", nothing)
print(json.dumps(statuses))
"""


def results(script, folder):
    """Return exit status and rows of each run, all from one process: children inherit faults."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", COMMON + script, str(folder), SEED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for name, status in json.loads(done.stdout.splitlines()[-1]).items():
        with (folder / f"{name}.csv").open(newline="") as file:
            found[name] = (status, list(csv.DictReader(file)))
    return found


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    return results(BY_HAND, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def frameworks(tmp_path_factory):
    pytest.importorskip("transformers", reason="the loops of frameworks need them")
    pytest.importorskip("lightning", reason="the loops of frameworks need them")
    return results(FRAMEWORKS, tmp_path_factory.mktemp("runs"))


def assert_identical(status, rows):
    assert status == 0
    for row in rows:
        assert row["kills_hit"] == row["kill_points"] == "2"
        assert (row["identical"], float(row["max_difference"])) == ("yes", 0.0)


def assert_seen(status, rows):
    assert status == 1
    (row,) = rows
    assert row["kills_hit"] == "2"
    assert row["identical"] == "no"
    assert float(row["max_difference"]) > 0


@pytest.mark.parametrize("loop", ["plain", "flat"])
def test_killed_runs_end_as_those_left_alone(loop, by_hand):
    status, rows = by_hand[loop]
    assert [row["loop"] for row in rows] == [loop]
    assert_identical(status, rows)


@pytest.mark.parametrize(
    "fault", ["no moments", "another dropout", "another order", "an older step"]
)
def test_a_wrong_resume_is_seen(by_hand, fault):
    assert_seen(*by_hand[fault])


@pytest.mark.long
def test_killed_runs_of_frameworks_end_as_those_left_alone(frameworks):
    status, rows = frameworks["frameworks"]
    assert [row["loop"] for row in rows] == ["trainer", "lightning"]
    assert_identical(status, rows)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["dropout of trainer", "dropout of lightning"])
def test_a_wrong_resume_in_a_framework_is_seen(frameworks, fault):
    assert_seen(*frameworks[fault])


@pytest.mark.parametrize("text", [None, "", '{"global_step": 3, "log_hi', '{"global_step": 3}\n'])
def test_a_checkpoint_of_trainer_is_whole_with_its_last_file(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    whole = importlib.import_module("kill_frameworks").whole
    (tmp_path / "model.safetensors").touch()
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    assert whole(tmp_path) == (text is not None and text.endswith("\n"))


def test_the_results_that_are_kept_are_all_identical():
    with (ROOT / "benchmarks" / "results" / "kill_resume.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    loops, presets = ({row[name] for row in rows} for name in ("loop", "preset"))
    assert (len(rows), len(loops), len(presets)) == (24, 4, 6)
    assert {(row["loop"], row["preset"]) for row in rows} == set(itertools.product(loops, presets))
    for row in rows:
        assert row["kills_hit"] == row["kill_points"] == "20"
        assert (row["identical"], float(row["max_difference"])) == ("yes", 0.0)
