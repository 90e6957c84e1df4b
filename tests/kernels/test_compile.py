"""Every kernel compiles for GPUs, without one, and takes what its tile was chosen for.

The interpreter takes what a compiler does not: an integer of 1 is a constant there, an argument may
have any name. And only compiled code shows whether loads are wide and registers suffice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from helpers.places import ROOT

SHARED = {80: 99 << 10, 90: 192 << 10}
"""Bytes of shared memory that a program gets: on the smallest devices, sm_86 and sm_89, which have
the tiles of sm_80, and where there is room for more."""

STACK = 128
"""Bytes of registers that may be spilled where bfloat16 moments and norms come together: some fifty
of eight thousand instructions, after the products. None in the other variants compiled here."""

EARLIER = "float32, r 256|project .*8bit|stochastic|scores|signs|sample"
"""What is compiled for sm_80 too; sm_90 gets everything."""

RECOMPILED = """
import torch
import compiled as c
from kernel_variants import Variant, moment
from lowrank_optim import Update, functional, kernels

def forms(count, step, seed, rate, ranks=64):
    def call():
        grads = [torch.empty(64, 128, dtype=torch.bfloat16) for _ in range(count)]
        bases = [torch.empty(128, ranks, dtype=torch.bfloat16) for _ in range(count)]
        noises = [functional.Noise(seed, step, functional.stream_of(k)) for k in range(count)]
        for state in ("float32", "8bit"):
            moments = [[moment((64, ranks), state, s) for _ in grads] for s in (False, True)]
            full = [[moment((64, 128), state, s) for _ in grads] for s in (False, True)]
            numbers = ([step] * count, rate, rate, rate, noises)
            found = kernels.project_moments(grads, bases, *moments, *numbers)
            numbers = ([step] * count, rate, rate, rate, rate, rate, noises, True)
            kernels.adam_step(grads, grads, *full, *numbers)
        update = Update(direction=rate or 1, low=rate or 1, grad=rate or 1)
        lengths = torch.ones(count)
        kernels.lift_write(grads, grads, bases, *found[:2], update, rate, rate, noises, lengths)
        sample = [[torch.empty(64, 16) for _ in grads] for _ in range(2)]
        firsts = [seed * step + k for k in range(count)]
        kernels.sample_moments(grads, *sample, firsts, [step] * count, rate, rate, rate)
        update = Update(direction=rate or 1, sign=rate or 1)
        kernels.sign_squares(grads, bases, *found[:2], update)
    return [
        (x.fn.__name__, c.specialized(x, 90)[1:]) for x in c.launches(Variant("", "", call), 90)
    ]

assert len(forms(1, 1, 5, 0.5)) == 11
for numbers in ((16, 16, 5, 0.25), (3, 7, 6, 1), (2, 1 << 20, 16, 1e-9), (1, 2, 5, 0.0)):
    assert forms(*numbers) == forms(1, 1, 5, 0.5), numbers
"""


@pytest.fixture(scope="module")
def run():
    """Start Python on the benchmark or on code that imports it, with a compiler in place."""
    pytest.importorskip("triton", reason="kernels need triton")
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no compiler for CUDA")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), env.get("PYTHONPATH", "")])

    def start(*args):
        command = [sys.executable, "-W", "ignore", *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)

    return start


def output(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    return out


@pytest.mark.long
def test_kernels_fit_the_devices(run):
    script = [str(ROOT / "benchmarks" / "compiled.py"), "--json", "--jobs", "1", "--arch"]
    both = [run(*script, "90"), run(*script, "80", "--only", EARLIER)]
    rows = [row for process in both for row in json.loads(output(process))]
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"_project", "_project_eight", "_lift", "_adam", "_quantize", "_scores"}
    assert kernels >= {"_signs", "_sample"}
    for row in rows:
        kernel, what = row["kernel"], row["variant"]
        assert row["shared"] <= SHARED[row["arch"]], row
        assert row["stack"] <= (STACK if "state bfloat16" in what and "norms" in what else 0), row
        if kernel in ("_project", "_lift", "_signs"):
            products = (
                "fma" if what.startswith("float32") else "wgmma" if row["arch"] > 80 else "mma"
            )
            assert row[products] > 0, row
            if what.startswith("bfloat16"):  # narrow copies of float32 turn a tile around
                assert row["copy16"] == row["copy"] > 0, row
            assert row["store16"] > 0 or kernel == "_signs", row  # it stores a number a tile
        if kernel in ("_project", "_lift", "_signs", "_adam", "_scores"):
            assert row["copy16"] + row["load16"] > 0, row


def test_no_number_of_a_step_compiles_a_kernel_again(run):
    output(run("-c", RECOMPILED))
