"""The kill benchmark passes with a few kills, and fails where a resume is wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRONG = ("no moments", "another dropout", "another order", "an older step")
RUN = """
import json, sys, torch
import kill_resume
from lowrank_optim import LowRank

class Forgetful(torch.Generator):
    def set_state(self, state):
        return self

def without_moments(optimizer, saved, right=LowRank.load_state_dict):
    right(optimizer, saved)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()

def one_step_older(path, right=torch.load, **settings):
    saved = right(path, **settings)
    return {**saved, "step": saved["step"] - 1}

def run(name, presets):
    path = f"{sys.argv[1]}/{name}.csv"
    common = ["--kills", "2", "--steps", "120", "--seed", SEED]
    return kill_resume.main(["--presets", presets, "--out", path, *common])

def with_fault(name, preset, owner, attribute, wrong):
    right = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    status = run(name, preset)
    setattr(owner, attribute, right)
    return status

print(json.dumps({
    "right": run("right", "fira,galore-8bit-bf16"),
    "no moments": with_fault(
        "no moments", "galore", LowRank, "load_state_dict", without_moments),
    "another dropout": with_fault(
        "another dropout", "apollo", torch, "set_rng_state", lambda state: None),
    "another order": with_fault("another order", "frugal", torch, "Generator", Forgetful),
    "an older step": with_fault("an older step", "dct", torch, "load", one_step_older),
}))
"""
SEED = "59"
"""Kills after steps 10 and 28 of 120: after the first checkpoint, and long before the end."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Exit status and rows of each run, all from one process: its children inherit the faults."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    folder = tmp_path_factory.mktemp("runs")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("SEED", repr(SEED)), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for name, status in statuses.items():
        with (folder / f"{name}.csv").open(newline="") as file:
            found[name] = (status, list(csv.DictReader(file)))
    return found


def test_killed_runs_end_as_those_left_alone(runs):
    status, rows = runs["right"]
    assert status == 0
    assert [row["preset"] for row in rows] == ["fira", "galore-8bit-bf16"]
    for row in rows:
        assert row["kills_hit"] == row["kill_points"] == "2"
        assert (row["identical"], float(row["max_difference"])) == ("yes", 0.0)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_resume_is_seen(runs, fault):
    status, (row,) = runs[fault]
    assert status == 1
    assert row["kills_hit"] == "2"
    assert row["identical"] == "no"
    assert float(row["max_difference"]) > 0


def test_the_results_that_are_kept_are_all_identical():
    with (ROOT / "benchmarks" / "results" / "kill_resume.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        assert row["kills_hit"] == row["kill_points"] == "20"
        assert (row["identical"], float(row["max_difference"])) == ("yes", 0.0)
