"""What a training step costs in wall time: all methods in turn, in one process.

Runs of pretrain.py share a machine, so their times say little. Here every method does a step in
turn, over and over, so that what else the machine does falls on all of them alike. A step is
forward, backward and update; its cost is the median of steps without a refresh, to which the
refresh's own extra cost is added once in as many steps as lie between two. Rows go to
results/pretrain_time.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from pretraining import data
from pretraining.methods import METHODS, build_optimizer
from pretraining.runner import WORK
from pretraining.tasks import TASKS, build_model
from pretraining.train import batch, mean_loss
from pretraining.tune import base
from provenance import provenance
from reporting.times import RESULTS

FIELDS = ("task", "method", "step_ms", "plain_ms", "refresh_ms", "gap", "rounds", "device", "torch",
          "threads", "commit", "date")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure every method on a task and replace its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", default="3m", choices=TASKS)
    parser.add_argument("--rounds", type=int, default=20, help="steps without a refresh")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = measure(args.task, args.rounds, args.device, args.work)
    rows = []
    if args.results.exists():
        with args.results.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["task"] != args.task]
    shared = {
        "task": args.task,
        "rounds": args.rounds,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        **provenance(),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for name, times in found.items():
            writer.writerow(shared | {"method": name} | times)
            print(name, times)
    return 0


def measure(task_name: str, rounds: int, device: str, work: Path) -> dict[str, dict[str, object]]:
    """Return the cost of a step of each method, milliseconds.

    Every method refreshes at its first step and every `rounds + 1` steps from there; the first
    refresh, which also makes the state, is not counted.
    """
    task = TASKS[task_name]
    text = data.load(task.vocab, task.text << 20, work)
    sides = {}
    for name in METHODS:
        model = build_model(task, 0, "float32", device)
        spec = base(task_name, name, change="stagger=False")
        spec = spec._replace(gap=1 if spec.gap == 1 else rounds + 1)
        sides[name] = (model, build_optimizer(spec, model))
    spent: dict[str, list[float]] = {name: [] for name in METHODS}
    for step in range(1, 2 * rounds + 3):
        tokens = batch(text.splits["train"], task, 0, step).to(device)
        for name, (model, optimizer) in sides.items():
            synchronize(device)
            started = time.perf_counter()
            optimizer.zero_grad()
            mean_loss(model, tokens).backward()
            optimizer.step()
            synchronize(device)
            spent[name].append(1e3 * (time.perf_counter() - started))
    found: dict[str, dict[str, object]] = {}
    for name, times in spent.items():
        gap = base(task_name, name).gap
        plain = statistics.median(times[1 : rounds + 1] + times[rounds + 2 :])
        refresh = 0.0 if gap == 1 else max(0.0, times[rounds + 1] - plain)
        found[name] = {
            "step_ms": f"{plain + refresh / gap:.2f}",
            "plain_ms": f"{plain:.2f}",
            "refresh_ms": f"{refresh:.2f}",
            "gap": gap,
        }
    return found


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
