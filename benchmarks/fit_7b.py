"""Does LLaMA-7B train on a card of 24 GiB, and on one of 16? Peak memory and tokens a second.

Plans with the package's planner: at each card the largest rank that fits, then the largest batch.
Each case is trained by `fit_case.py` in a process of its own, on a larger GPU whose memory is
capped there; a case of ours that runs out of memory after all is tried again smaller. Rows go to
the csv at once, and cases that it has are not repeated. README.md says what is assumed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fit_case import GIB, METHODS, OURS, Case, build_model, cap_bytes
from provenance import output, provenance

import lowrank_optim
from lowrank_optim.methods.registry import COMPARED as PLANNED
from lowrank_optim.planner.models import token_loss
from lowrank_optim.planner.needs import Needs, needs_of
from lowrank_optim.planner.phases import Parts, phases_of, weight_bytes
from lowrank_optim.planner.search import Traces

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fit_7b.csv"
RANKS, BATCHES, CARDS = (1024, 512, 256, 128), (16, 8, 4, 2, 1), (24, 16)
SPARE = GIB // 4
"""Left free in a plan: for libraries' workspaces, and for what lies between blocks of memory."""
FIRST = 90.0
"""Seconds for a case before one has been timed: it also compiles the kernels."""
GRACE = 45.0
"""Seconds after the budget until which a case that has been started may go on."""
FIELDS = """size method card rank batch length steps outcome phase message predicted_peak cap_bytes
peak_allocated peak_reserved outside_bytes weight_bytes state_bytes tokens_per_s first_step_s
loss_first loss_last device driver torch transformers triton package commit date""".split()  # noqa: SIM905
DONE = ("trained", "out of memory")
Row = dict[str, Any]


@functools.cache
def traces(size: str, length: int) -> Traces:
    """Return the model's passes without memory, at any batch."""
    return Traces(build_model(size, "meta"), token_loss, 2, length)


@functools.cache
def needs(size: str, method: str, rank: int, length: int) -> Needs:
    """Return what the optimizer takes, in 8 bits where it is ours."""
    return needs_of(PLANNED[method], traces(size, length).model, rank, "8bit")


def planned_parts(case: Case) -> Parts:
    """Return what lives at the peak of a case; from shapes, nothing measured."""
    passes = traces(case.size, case.length)
    found = needs(case.size, case.method, case.rank, case.length)
    phases = phases_of(passes.at(case.batch), found, weight_bytes(passes.model), layerwise=True)
    return max(phases.values(), key=lambda parts: parts.total)


def predicted_peak(case: Case) -> int:
    """Return the sum of the parts."""
    return planned_parts(case).total


def fits(case: Case) -> bool:
    """Return whether it should fit the card."""
    return predicted_peak(case) + SPARE <= cap_bytes(case.card)


def planned(method: str, card: int) -> Case:
    """Return the case with the largest rank that fits at batch 1, and then the largest batch."""
    smallest = Case("7b", method, card, RANKS[-1], 1)
    rank = next((r for r in RANKS if fits(smallest._replace(rank=r))), RANKS[-1])
    case = smallest._replace(rank=rank)
    return next((c for b in BATCHES if fits(c := case._replace(batch=b))), case)


def smaller(case: Case) -> list[Case]:
    """Return what to try where one of ours did not fit: half the batch, or else half the rank."""
    if case.method in OURS and case.batch > 1:
        return [case._replace(batch=case.batch // 2)]
    return [case._replace(rank=case.rank // 2)] if case.rank > RANKS[-1] else []


def cases(tiny: bool) -> list[Case]:
    """Return what is to be trained, what matters most first."""
    if tiny:
        return [Case("tiny", m, 0, 16 * (m in OURS), 2, length=32, steps=4) for m in METHODS]
    ours = [planned(method, card) for card in CARDS for method in OURS]
    theirs = [Case("7b", m, card, 0, 1) for card in CARDS for m in METHODS if m not in OURS]
    free = [Case("7b", m, 0, 0, BATCHES[0]) for m in METHODS if m not in OURS]
    single = [case._replace(batch=1) for case in ours if case.batch > 1]
    return [*ours, *theirs[:2], *free, *theirs[2:], *single]


def key_of(row: Row) -> tuple[str, ...]:
    """Return what tells rows apart."""
    return tuple(str(row[name]) for name in Case._fields)


def load(path: Path) -> dict[tuple[str, ...], Row]:
    """Return the rows of a csv, if there is one."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {key_of(row): row for row in csv.DictReader(file)}


def save(rows: dict[tuple[str, ...], Row], path: Path) -> None:
    """Write all rows, so that a run that is cut short keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    unfinished.replace(path)


def train(case: Case, limit: float) -> Row:
    """Run a case in a process of its own, for so many seconds at most."""
    command = [sys.executable, str(HERE / "fit_case.py"), json.dumps(case._asdict())]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "message": f"stopped after {limit:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = " ".join(done.stderr.split())[-300:]
        return {"outcome": "failed", "message": f"exit status {done.returncode}: {said}"}


def facts() -> Row:
    """Return what is the same in all rows of a run."""
    return {
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "transformers": release("transformers"),
        "triton": release("triton"),
        "package": lowrank_optim.__version__,
        **provenance(),
    }


def release(name: str) -> str:
    """Return the version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def line(row: Row) -> str:
    """Return a row in short, memory in GiB."""
    names = ("predicted_peak", "cap_bytes", "peak_allocated", "peak_reserved", "state_bytes")
    sizes = [f"{int(row[n]) / GIB:8.2f}" if row.get(n) else f"{'-':>8}" for n in names]
    card = f"{row['card']} GiB" if int(row["card"]) else "no cap"
    end = " ".join(filter(None, (row.get("outcome"), row.get("phase"), row.get("message"))))
    if end == "trained":
        end = "{tokens_per_s} tokens/s, loss {loss_first} to {loss_last}".format(**row)
    return f"{row['method']:<9} {card:<7}{row['rank']:>5}{row['batch']:>6}{''.join(sizes)}  {end}"


def main(arguments: list[str] | None = None, run: Callable[[Case, float], Row] = train) -> int:
    """Run the cases that the csv lacks, as far as the budget goes; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the csv to add to")
    parser.add_argument("--budget", type=float, default=540, help="seconds (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, no caps; on a CPU too")
    parser.add_argument("--plan", action="store_true", help="only print what was computed")
    args = parser.parse_args(arguments)
    start, longest = time.perf_counter(), 0.0
    print("method    card    rank batch    plan     cap   alloc. reserved  state, in GiB")
    waiting, rows, same = cases(args.tiny), load(args.out), facts()
    failed = 0
    while waiting:
        case = waiting.pop(0)
        row: Row = {**case._asdict(), "predicted_peak": predicted_peak(case)}
        if args.plan:
            print(line({**row, "cap_bytes": cap_bytes(case.card)}))
            continue
        known = rows.get(key_of(row))
        if known is not None and known["outcome"] in DONE:
            row = known
        else:
            begun = time.perf_counter()
            left = args.budget - (begun - start)
            if (1.3 * longest or FIRST) > left:
                print(f"left out, for want of time: {case.method} {case.card} {case.batch}")
                continue
            row |= same | run(case, left + GRACE)
            longest = max(longest, time.perf_counter() - begun)
            rows[key_of(row)] = row
            save(rows, args.out)
        print(line(row), flush=True)
        failed += row["outcome"] == "failed"
        if row["outcome"] == "out of memory":
            waiting[:0] = smaller(case)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
