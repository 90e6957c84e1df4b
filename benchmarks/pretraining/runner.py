"""Runs side by side: each plan says which run it wants next, in view of what came out before."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from provenance import provenance
from rich.console import Console

from . import data
from .ledger import Ledger
from .methods import Spec
from .tasks import TASKS
from .train import OutOfTimeError, Result, train

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "pretrain.csv"
WORK = ROOT / ".pretrain"

Runs = Generator[Spec, float, None]
"""Yields runs one after the other and is sent their losses."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the csv to extend")
    parser.add_argument("--work", type=Path, default=WORK, help="tokens and unfinished runs")
    parser.add_argument("--text", default="machine", choices=data.SOURCES, help="(%(default)s)")


def run(plans: Iterable[Runs], args: argparse.Namespace) -> bool:
    """Do `work_off` as the command line says."""
    return work_off(
        plans, Ledger(args.results), args.work,
        device=args.device, jobs=args.jobs, budget=args.budget, source=args.text,
    )  # fmt: skip


def work_off(
    plans: Iterable[Runs],
    ledger: Ledger,
    work: Path,
    *,
    device: str,
    jobs: int,
    budget: float = math.inf,
    source: str = "machine",
) -> bool:
    """Do what the plans want and is not in the ledger; return whether all of it is done.

    Args:
        work: folder of the tokens' cache and of unfinished runs.
        device: "cpu" or "cuda".
        jobs: runs at a time; on a CPU each has one thread.
        budget: seconds after which no run is begun, and those under way are saved.
        source: of the text, see `data.load`.

    Raises:
        ValueError: the ledger's runs are of another text.
    """
    console, started = Console(highlight=False, soft_wrap=True), time.monotonic()
    deadline, code, finished = started + budget, provenance(), True
    known, waiting = ledger.losses(), deque(plans)
    running: dict[Future[Result], Runs] = {}
    threads = 1 if device == "cpu" else 4
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    )

    def proceed(plan: Runs, loss: float | None) -> None:
        """Pass over what is known already and begin the next run of a plan."""
        try:
            spec = next(plan) if loss is None else plan.send(loss)
            while spec in known:
                spec = plan.send(known[spec])
        except StopIteration:
            return
        task = TASKS[spec.task]
        text = data.load(task.vocab, task.text << 20, work, source)  # made before anyone needs it
        ledger.check_text(spec.task, text.name)
        running[pool.submit(train, spec, device, work, deadline, source)] = plan

    with pool:
        while waiting or running:
            while waiting and len(running) < jobs:
                if time.monotonic() > deadline:
                    waiting.clear()
                    finished = False
                else:
                    proceed(waiting.popleft(), None)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                plan = running.pop(future)
                try:
                    result = future.result()
                except OutOfTimeError as error:
                    console.print(str(error))
                    finished = False
                    continue
                ledger.add(result, device, threads, code)
                known[result.spec] = result.loss
                console.print(line(result))
                if time.monotonic() > deadline:
                    finished = False
                else:
                    proceed(plan, result.loss)
    return finished


def each(specs: Iterable[Spec]) -> list[Runs]:
    """Return a plan for each run alone."""

    def alone(spec: Spec) -> Runs:
        yield spec

    return [alone(spec) for spec in specs]


def line(result: Result) -> str:
    """Say in a line what came out."""
    spec = result.spec
    given = {key: spec._asdict()[key] for key in Spec._fields if key not in Spec._field_defaults}
    usual = Spec(**given)._asdict()
    other = ", ".join(
        f"{key}={value}"
        for key, value in spec._asdict().items()
        if key in usual and value != usual[key]
    )
    return (
        f"{spec.task} {spec.method} {spec.split} seed {spec.seed}, {spec.steps} steps, "
        f"lr {spec.lr:g}, rest_lr {spec.rest_lr:g}{', ' + other if other else ''}: "
        f"{result.loss:.4f} in {result.seconds:.0f} s"
    )
