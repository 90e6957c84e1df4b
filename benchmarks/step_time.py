"""Time and memory of `optimizer.step()` on the parameter lists of LLaMA models, beside the peers'.

Weights and gradients are random. Every optimizer starts from fresh state and the same numbers, and
the baseline, torch's fused AdamW, is measured before and after each, on the whole list and on its
matrices alone. What does not pass the gate (see
`peers.gate`) is not timed, and the exit status is 1. README.md says how to read the columns.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from peers import (
    BASELINE,
    BYTES,
    METHODS,
    NEVER,
    SIZES,
    Method,
    Problem,
    Sides,
    cheap_svd,
    floor,
    gate,
)
from rich import box
from rich.console import Console
from rich.table import Table
from timing import Row, Sample, facts, timed

USUAL = {"60m": [128], "1b": [512], "7b": [1024, 256, 512, 128]}
DEFAULTS = {"cuda": (["7b", "1b", "60m"], "bfloat16", 20), "cpu": (["60m"], "float32", 7)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIELDS = """method size layers rank dtype state impl kind repeats ms ms_min ms_max ratio
ps_per_param host_ms peak_bytes state_bytes floor_bytes_per_param floor_ms floor_gflop
floor_flop_ms baseline_ms gap params note copy_gb_s matmul_tflops device driver torch triton
package commit date threads""".split()  # noqa: SIM905
HEADS = "method state between x alone x bytes flops first refresh overall x MiB".split()  # noqa: SIM905
CAPTION = """ms a step; alone: the matrices without the rest; x: against fused AdamW on the same;
refresh of an SVD: ms a matrix; MiB: peak beyond the state"""


class Baseline(NamedTuple):
    """Times of torch's AdamW: on all parameters, and on the matrices alone."""

    whole: Sample
    alone: Sample


class Bench:
    """One run: its settings, its clock, what it has found and what it has left out."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console, self.device = args, console, args.device
        self.start, self.longest = time.perf_counter(), 0.0
        self.left_out, self.red = list[str](), dict[tuple[str, str], str]()
        self.facts = facts(self.device, DTYPES[args.dtype])

    def run(self) -> int:
        """Measure the whole plan; returns the exit status."""
        problem = None
        for size, rank, methods in plan(self.args):
            if problem is None or problem.size != size:
                problem, self.longest = None, 0.0
                problem = Problem(size, self.args.layers, DTYPES[self.args.dtype], self.device)
            baselines, rows = [self.baseline(problem)], []
            for method, state in methods:
                begun = time.perf_counter()
                if begun - self.start + 1.2 * self.longest > self.args.budget:
                    self.left_out.append(f"{method.name} at {size}, rank {rank}, state {state}")
                elif (found := self.case(problem, method, rank, state)) is not None:
                    baselines.append(self.baseline(problem))
                    done = [
                        self.complete(r, problem, method, rank, state, baselines[-2:])
                        for r in found
                    ]
                    save(done, self.args.out)
                    rows += done
                    self.longest = max(self.longest, time.perf_counter() - begun)
            for kind, samples in zip(
                ("between", "alone"), zip(*baselines, strict=True), strict=True
            ):
                pooled = Sample([ms for b in samples for ms in b.ms], [], samples[0].peak)
                low, high = (f(median(b.ms) for b in samples) for f in (min, max))
                note = f"{len(samples)} runs, medians from {low:.4g} to {high:.4g} ms"
                row = pooled.row(kind) | {"note": note}
                both = [Baseline(pooled, pooled)]
                row = self.complete(row, problem, BASELINE, rank, self.args.dtype, both)
                save([row], self.args.out)
                rows.append(row)
            rows.sort(key=lambda row: row["method"] != BASELINE.name)
            show(self.console, rows, problem)
        for name in self.left_out:
            self.console.print(f"left out, the budget of {self.args.budget:g} s is spent: {name}")
        for (name, state), why in self.red.items():
            self.console.print(f"NOT TIMED, the gate is red: {name}, state {state}: {why}")
        self.console.print(f"{time.perf_counter() - self.start:.0f} s")
        return 1 if self.red else 0

    def baseline(self, problem: Problem) -> Baseline:
        """Measure torch's AdamW."""

        def measured(sides: Sides) -> Sample:
            problem.reset()
            optimizer = BASELINE.build(sides.matrices, sides.rest)
            return timed(optimizer.step, self.device, self.args.repeats, warm=2, limit=20)

        return Baseline(measured(problem), measured(problem.alone))

    def case(self, problem: Problem, method: Method, rank: int, state: str) -> list[Row] | None:
        """Measure one method, or return a row that says what it raised; None for a red gate."""
        try:
            why = gate(method, DTYPES[self.args.dtype], self.device, state, self.args.impl)
            if not why:
                rows = list(self.measure(problem, method, rank, state))
                return [*rows, self.measure_alone(problem, method, rank, state)]
            self.red[method.name, state] = why
            return None
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return [{"kind": "none", "note": text[:300]}]
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def measure(self, problem: Problem, method: Method, rank: int, state: str) -> Iterator[Row]:
        """Yield the rows of one method."""
        problem.reset()
        repeats = self.repeats(method)
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        sides = (problem.matrices, problem.rest)
        build = self.builder(method, rank, state)
        optimizer = build(*sides, gap=1 if method.ours else NEVER)
        note = "first basis from a QR stand-in for the SVD" if method.svd else ""
        with cheap_svd(rank) if method.svd else nullcontext():
            first = timed(optimizer.step, self.device)
        held = torch.cuda.memory_allocated() - before if self.device == "cuda" else ""
        yield first.row("first") | {"state_bytes": held, "note": note}
        step_ms = 0.0
        if method.gap != 1:
            set_gap(optimizer, method, NEVER)
            between = timed(optimizer.step, self.device, repeats, warm=1, limit=20)
            yield between.row("between") | {"state_bytes": held, "note": note}
            step_ms = median(between.ms)
        if method.svd:
            del optimizer
            added, note = self.svd_refresh(problem, build)
            yield {"kind": "refresh-per-matrix", "ms": added / len(problem.matrices), "note": note}
        elif method.gap:
            set_gap(optimizer, method, 1)
            if not method.ours:
                optimizer = build(*sides, gap=1)
                optimizer.step()
            refresh = timed(optimizer.step, self.device, max(3, repeats // 4), limit=5)
            yield refresh.row("refresh") | {"state_bytes": held}
            added = median(refresh.ms) - step_ms
        if method.gap:
            yield {"kind": "with-refreshes", "ms": step_ms + added / method.gap, "note": note}

    def measure_alone(self, problem: Problem, method: Method, rank: int, state: str) -> Row:
        """Return the row of the steps between refreshes, if there are any, of matrices alone."""
        problem.reset()
        build = self.builder(method, rank, state)
        optimizer = build(problem.matrices, [], gap=1 if method.ours else NEVER)
        with cheap_svd(rank) if method.svd else nullcontext():
            optimizer.step()
        if method.gap != 1:
            set_gap(optimizer, method, NEVER)
        sample = timed(optimizer.step, self.device, self.repeats(method), warm=1, limit=20)
        return sample.row("alone")

    def builder(self, method: Method, rank: int, state: str) -> Callable[..., Any]:
        """Return what makes the optimizer of a method from matrices, the rest and a gap."""
        settings = {"state_dtype": state, "impl": self.args.impl} if method.ours else {}
        return partial(method.build, rank=1.0 if method.full else rank, **settings)

    def repeats(self, method: Method) -> int:
        """Return how many steps are timed."""
        most: int = self.args.repeats
        return most if method.ours else min(5, most)

    def svd_refresh(self, problem: Problem, build: Callable[..., Any]) -> tuple[float, str]:
        """Return what a refresh takes, inferred from one matrix of each kind, and a note."""
        total = 0.0
        for shape, count in problem.kinds.items():
            one = build([problem.one(shape)], [], gap=NEVER)
            first, second = (timed(one.step, self.device).ms[0] for _ in range(2))
            total += count * problem.layers * (first - second)
        return total, f"svd timed on {len(problem.kinds)} matrices, the rest inferred"

    def complete(
        self,
        row: Row,
        problem: Problem,
        method: Method,
        rank: int,
        state: str,
        baselines: list[Baseline],
    ) -> Row:
        """Return a row with all that follows from its time and its place."""
        alone = row["kind"] == "alone"
        sides: Sides = problem.alone if alone else problem
        samples = [each.alone if alone else each.whole for each in baselines]
        baseline = sum(median(sample.ms) for sample in samples) / len(samples)
        full = {"method": method.name, "size": problem.size, "layers": problem.layers, "rank": rank}
        full |= {"dtype": self.args.dtype, "state": state, "baseline_ms": f"{baseline:.4g}"}
        full |= {"impl": self.args.impl if method.ours else "", "gap": method.gap, **self.facts}
        full |= {"params": sides.params, **row}
        if ms := row.get("ms"):
            full |= {"ms": f"{ms:.4g}", "ratio": f"{ms / baseline:.3f}"}
            full["ps_per_param"] = f"{1e9 * ms / sides.params:.4g}"
            if row["kind"] in ("between", "alone") or (
                method.gap == 1 and row["kind"] == "refresh"
            ):
                total, flops = floor(method, sides, rank, state)
                full["floor_bytes_per_param"] = f"{total / sides.params:.3f}"
                full["floor_ms"] = f"{total / self.facts['copy_gb_s'] / 1e6:.4g}"
                full["floor_gflop"] = f"{flops / 1e9:.1f}"
                full["floor_flop_ms"] = f"{flops / self.facts['matmul_tflops'] / 1e9:.4g}"
        return full


def set_gap(optimizer: Any, method: Method, gap: int) -> None:
    """Set the gap between refreshes of one of ours; a peer's was set when it was built."""
    for group in optimizer.param_groups if method.ours else []:
        group["update_proj_gap"] = gap


def plan(args: argparse.Namespace) -> Iterator[tuple[str, int, list[tuple[Method, str]]]]:
    """Yield size, rank, and methods with their state, what matters most first.

    Peers whose state does not depend on the rank, and what is not projected, come once a size; so
    do the peers that are slow, at the first rank, unless methods are named.
    """
    for size in args.size:
        for place, rank in enumerate(args.rank or USUAL[size]):
            chosen = []
            for name in args.method or METHODS:
                method = METHODS[name]
                states = args.state if method.ours else [method.state or args.dtype]
                once = not method.projects or not (method.ours or args.method)
                if place == 0 or not once:
                    chosen += [(method, state) for state in states]
            yield size, rank, chosen


def save(rows: list[Row], path: Path | None) -> None:
    """Add rows to the csv, at once: a run that is cut short keeps what it has."""
    if path is not None:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)


def show(console: Console, rows: list[Row], problem: Problem) -> None:
    """Print the rows of one size and rank, a line for each method and state, then the notes."""
    one, notes, lines = rows[0], dict[str, list[str]](), dict[tuple[str, str], dict[str, Row]]()
    title = (
        f"LLaMA {problem.size}, {problem.layers} layers, {problem.params / 1e6:.1f}M parameters, "
        f"{one['dtype']}, rank {one['rank']}\n{one['device']}, threads: {one['threads']}, "
        f"copy {one['copy_gb_s']:g} GB/s, products {one['matmul_tflops']:g} TFLOP/s"
    )
    table = Table(title=title, caption=CAPTION, box=box.SIMPLE_HEAD)
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("method", "state") else "right")
    for row in rows:
        lines.setdefault((row["method"], row["state"]), {})[row["kind"]] = row
    for (method, state), at in lines.items():
        steady = "between" if "between" in at else "refresh"

        def cell(kind: str, key: str = "ms", at: dict[str, Row] = at) -> str:
            text = at.get(kind, {}).get(key, "")
            return text and (f"{float(text):.3g}" if float(text) < 1000 else f"{float(text):.0f}")

        peak = at.get(steady, {}).get("peak_bytes", "")
        table.add_row(
            method, state, cell("between"), cell("between", "ratio"), cell("alone"),
            cell("alone", "ratio"), cell(steady, "floor_ms"), cell(steady, "floor_flop_ms"),
            cell("first"), cell("refresh") or cell("refresh-per-matrix"),
            cell("with-refreshes"), cell("with-refreshes", "ratio"),
            f"{peak / 2**20:.0f}" if peak != "" else "",
        )  # fmt: skip
        for note in dict.fromkeys(row["note"] for row in at.values() if row.get("note")):
            notes.setdefault(note, []).append(f"{method} {state}")
    console.print(table)
    for note, names in notes.items():
        console.print(f"{', '.join(names)}: {note}", markup=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the settings, those that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    add("--size", nargs="+", choices=SIZES, help="default: cuda all, cpu 60m")
    add("--layers", type=int, help="fewer layers than the model has")
    add("--dtype", choices=DTYPES, help="default: cuda bfloat16, cpu float32")
    add("--rank", nargs="+", type=int, help="default: usual for the size")
    add("--state", nargs="+", choices=BYTES, default=["float32"], help="of ours")
    add("--method", nargs="+", choices=METHODS, help="default: all")
    add("--impl", default="auto", help="of ours")
    add("--repeats", type=int, help="steps a time; default: cuda 20, cpu 7; peers at most 5")
    add("--budget", type=float, default=480, help="seconds")
    add("--out", type=Path, help="csv to add the rows to")
    args = parser.parse_args(argv)
    sizes, dtype, repeats = DEFAULTS[args.device]
    args.size, args.dtype = args.size or sizes, args.dtype or dtype
    args.repeats = args.repeats or repeats
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print and save; returns the exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Bench(parse(argv), Console(highlight=False, width=120)).run()


if __name__ == "__main__":
    sys.exit(main())
