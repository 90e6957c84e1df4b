"""Put each fault of `faults.py` into a copy of the checkout and see whether its tests fail.

    python tests/mutants/run.py [WORD ...] [--list] [--skip-clean]

WORD: only faults whose name or file has it. Every text to find is looked for first, and every named
test is run without faults (`--skip-clean` leaves that out); then the faults come one by one. Ends
with 0 if all are found, else with 1: a fault that survives, a text that is gone, a test that fails
without a fault, a run that is no test run at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
COPIED = ("lowrank_optim", "kernels", "tests", "benchmarks", "pyproject.toml", "README.md")
WARM = ("numpy", "scipy.fft", "hypothesis.strategies", "triton.language", "safetensors.torch")
"""What tests import that is not ours, as far as it is there: once for all faults."""
LIMIT = 600
"""Seconds after which a run counts as one that hangs, which is a way of failing."""


def copied(folder: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            skipped = shutil.ignore_patterns("__pycache__", "results", ".*")
            shutil.copytree(source, target, ignore=skipped)
        else:
            shutil.copy(source, target)


def tested(folder: Path, options: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Return the exit code of pytest on the copy and what it says; no code if it hangs.

    It runs in a fork, which has what all tests import already, but for the package itself.
    """
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os.chdir(folder)
            sys.path[:0] = map(str, (folder, folder / "tests"))
            os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
            sys.dont_write_bytecode = True
            code = pytest.main(["-q", "-m", "", "-p", "no:cacheprovider", *options])
            sys.stdout.flush()
            os._exit(code)
        status = waited(child, limit)
        said.seek(0)
        return status, said.read()


def waited(child: int, limit: float) -> int | None:
    """Return the exit code of a process; None if it was killed after so many seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def misplaced(faults: dict[str, Fault]) -> list[str]:
    """Return the names of faults whose text does not stand once in its file."""
    found = []
    for name, fault in faults.items():
        path = ROOT / fault.file
        count = path.read_text().count(fault.find) if path.is_file() else 0
        if count != 1 or fault.find == fault.put:
            found.append(f"{name}: its text stands {count} times in {fault.file}")
    return found


def outcome(folder: Path, fault: Fault) -> str:
    """Return what becomes of a fault: "found", "SURVIVES" or "BROKEN"."""
    path = folder / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.find, fault.put))
    try:
        code, said = tested(folder, ["-x", *fault.tests], LIMIT)
    finally:
        path.write_text(text)
    if code is None or code == 1:
        return "found"
    return "SURVIVES" if code == 0 and " passed" in said else f"BROKEN: {said[-3000:]}"


def warm_up() -> None:
    """Import what forks need, as the tests' own configuration would have it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in WARM:
        if find_spec(name.partition(".")[0]):
            import_module(name)


def main() -> int:
    """Run the faults that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="parts of names or files of faults")
    parser.add_argument("--list", action="store_true", help="show the faults and end")
    parser.add_argument("--skip-clean", action="store_true", help="trust the tests without faults")
    args = parser.parse_args()
    chosen = {
        name: fault
        for name, fault in FAULTS.items()
        if not args.words or any(word in f"{name} {fault.file}" for word in args.words)
    }
    if args.list:
        for name, fault in chosen.items():
            print(f"{name} ({fault.file}): {fault.why}\n    {' '.join(fault.tests)}")
        return 0
    if wrong := misplaced(chosen) or ([] if chosen else ["there is no such fault"]):
        print("\n".join(wrong))
        return 1
    warm_up()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        if not args.skip_clean:
            tests = sorted({test for fault in chosen.values() for test in fault.tests})
            code, said = tested(folder, tests, LIMIT * len(tests))
            if code != 0:
                print(f"without any fault:\n{said[-6000:]}")
                return 1
        for number, (name, fault) in enumerate(chosen.items(), 1):
            start = time.perf_counter()
            what = outcome(folder, fault)
            failed += what != "found"
            seconds = time.perf_counter() - start
            print(f"{number:>3}/{len(chosen)} {seconds:5.1f} s  {what:<9} {name}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} faults found")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
