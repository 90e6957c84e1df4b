"""Kill training again and again, resume it, and compare it bit for bit with a run left alone.

Each preset trains a small model in each loop of `kill_loops.py` and `kill_frameworks.py`, in
processes that are killed (SIGKILL) at random points: in a step, while a checkpoint is written,
while one is read. The next process resumes from the newest whole checkpoint, until the run is done.
Every loss that any of them wrote to the log, the final weights and the final state dict of the
optimizer must be those of a run that was not killed. Rows go to results/kill_resume.csv; the exit
status is 1 if anything differs.

Processes are forked from this one, which has imported torch and the frameworks and runs nothing
itself, so that each starts in some hundredths of a second. One CPU core is enough; needs a system
with fork.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which torch.optim imports at its first use: 2 s in every process otherwise
from kill_frameworks import HuggingFace, Lightning
from kill_loops import PRESETS, SAVE_EVERY, Flat, Job, Plain
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowrank_optim import flatten_state

RESULTS = Path(__file__).parent / "results" / "kill_resume.csv"
LOOPS: dict[str, Callable[[], Any]] = {
    "plain": Plain,
    "flat": Flat,
    "trainer": HuggingFace,
    "lightning": Lightning,
}
FIELDS = (
    "loop", "preset", "steps", "kill_points", "kills_hit", "while_saving", "while_starting",
    "steps_repeated", "max_difference", "identical", "seed", "torch",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the presets in the loops, write the rows, show them; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loops", default=",".join(LOOPS), help="comma-separated")
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated")
    parser.add_argument("--kills", type=int, default=20, help="points a preset and loop")
    parser.add_argument("--steps", type=int, default=201, help=f"a multiple of {SAVE_EVERY}")
    parser.add_argument("--seed", type=int, default=0, help="of the points and of the training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the csv to write")
    args = parser.parse_args(arguments)
    loops, presets = args.loops.split(","), args.presets.split(",")
    for kind, names, known in (("loop", loops, LOOPS), ("preset", presets, PRESETS)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"unknown {kind} {unknown[0]!r}; choose among {', '.join(known)}")
    if args.steps % SAVE_EVERY:
        parser.error(f"--steps={args.steps}: a multiple of {SAVE_EVERY}, to end with a checkpoint")
    torch.set_num_threads(1)
    rows = []
    for name in loops:
        loop = LOOPS[name]()
        gc.freeze()  # Trainer collects garbage first, among all that was imported
        for preset in presets:
            with tempfile.TemporaryDirectory() as folder:
                counts = examine(loop, preset, Path(folder), args.kills, args.steps, args.seed)
            rows.append({"loop": name, **counts})
    gc.unfreeze()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    show(rows)
    return 0 if all(row["identical"] == "yes" for row in rows) else 1


def examine(
    loop: Any, preset: str, folder: Path, kills: int, steps: int, seed: int
) -> dict[str, Any]:
    """Train a preset alone and with kills; return the row that compares them."""
    alone, killed = (Job(PRESETS[preset], folder / name, steps, seed) for name in ("one", "two"))
    alone.folder.mkdir()
    killed.folder.mkdir()
    wait(fork(lambda: loop.train(alone)))
    wanted = logged(alone)
    pace = (wanted[-1][2] - wanted[0][2]) / steps
    rng = random.Random(f"{type(loop).__name__} {preset} {seed}")
    hits = {"step": 0, "saving": 0, "starting": 0}
    for step in sorted(rng.randrange(steps - 5 * SAVE_EVERY) for _ in range(kills)):
        place = kill_one(loop, killed, step, rng.uniform(0, 3 * pace))
        if place is None:
            break
        hits[place] += 1
    wait(fork(lambda: loop.train(killed)))
    found = logged(killed)
    if {step for step, *_ in found} != set(range(steps)):
        raise RuntimeError(f"{preset}: the log does not have the steps 0 to {steps - 1}")
    truth = {step: loss for step, loss, _ in wanted}
    worst = max(difference(loss, truth[step]) for step, loss, _ in found)
    worst = max(worst, apart(final(loop, alone), final(loop, killed)))
    return {
        "preset": preset,
        "steps": steps,
        "kill_points": kills,
        "kills_hit": sum(hits.values()),
        "while_saving": hits["saving"],
        "while_starting": hits["starting"],
        "steps_repeated": len(found) - steps,
        "max_difference": worst,
        "identical": "yes" if worst == 0 else "no",
        "seed": seed,
        "torch": torch.__version__,
    }


def fork(work: Callable[[], None]) -> int:
    """Start a process that does some work and ends; return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int) -> None:
    """Wait for a process to end by itself; raise RuntimeError if it failed."""
    _, status = os.waitpid(pid, 0)
    check_ended(status)


def check_ended(status: int) -> None:
    """Raise RuntimeError unless a process came to its end."""
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"a process that was not killed ended with status {status}, see above")


def kill_one(loop: Any, job: Job, step: int, delay: float) -> str | None:
    """Start a process and kill it `delay` seconds after the log shows a step.

    Returns:
        What it was doing: "saving", "starting" (nothing logged yet) or "step"; None if it was done.
    """
    before, unfinished = len(logged(job)), left(loop, job)
    pid = fork(lambda: loop.train(job))
    while max((number for number, *_ in logged(job)), default=-1) < step:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            check_ended(status)
            return None
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        check_ended(status)
        return None
    if left(loop, job) - unfinished:
        return "saving"
    return "step" if len(logged(job)) > before else "starting"


def left(loop: Any, job: Job) -> set[tuple[Path, int]]:
    """Return what saves that were killed have left, and when it was written."""
    return {(path, path.stat().st_mtime_ns) for path in loop.unfinished(job.folder)}


def logged(job: Job) -> list[tuple[int, float, float]]:
    """Return the steps, losses and times of a log, in the order in which they were written."""
    if not (job.folder / "log").exists():
        return []
    whole_lines = (job.folder / "log").read_text().rpartition("\n")[0].splitlines()
    fields = [line.split() for line in whole_lines]
    return [(int(step), float.fromhex(loss), float(when)) for step, loss, when in fields]


def final(loop: Any, job: Job) -> dict[str, Tensor]:
    """Return the weights and the optimizer's state dict at the end, its text as bytes."""
    weights, state = loop.final(job.folder)
    tensors, text = flatten_state(state)
    written = torch.tensor(list("".join(text.values()).encode()))
    return {**weights, **tensors, "text": written}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of tensors, 0 only if they are equal to the bit."""
    if one.keys() != other.keys():
        return math.inf
    worst = 0.0
    for name, value in one.items():
        if (value.shape, value.dtype) != (other[name].shape, other[name].dtype):
            return math.inf
        if torch.equal(value, other[name]):
            continue
        gap = float((value.double() - other[name].double()).abs().max())
        worst = max(worst, gap if gap > 0 else math.inf)
    return worst


def difference(left: float, right: float) -> float:
    """Return the difference of two losses; infinity where one is not a number."""
    gap = abs(left - right)
    return math.inf if math.isnan(gap) else gap


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table(title="killed and resumed, against a run left alone")
    for name in FIELDS[:-2]:
        text = name in ("loop", "preset")
        table.add_column(name.replace("_", " "), justify="left" if text else "right", no_wrap=text)
    for row in rows:
        table.add_row(*(str(row[name]) for name in FIELDS[:-2]))
    Console(width=130).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
