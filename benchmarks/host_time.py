"""What a step costs outside the arithmetic: times of small parameters, files and calls, the import.

GaLore between refreshes stands beside torch's AdamW in its loop (`foreach=False`), which calls the
same few operations for each parameter, and beside its fused form. Optimizers take turns, and a time
is that of the thread, so that what runs beside it counts less. Floors are those of `step_time.py`.

  python benchmarks/host_time.py --out benchmarks/results/host_time.csv
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from peers import METHODS, NEVER, Sides, floor
from rich import box
from rich.console import Console
from rich.table import Table
from rows import append
from timing import Row, facts

import lowrank_optim
from lowrank_optim import GaLoreAdamW

RANK = 8
Shape = tuple[int, ...]
Step = Callable[[], Any]

TRACED: list[Shape] = [(24, 16)] * 4 + [(24,)]
"""The vector has a group of its own. A third step took 28 files and 654 calls at commit 53d44e3."""

SMALL: list[Shape] = [(24, 16)] * 140 + [(24,)] * 60
ODD: list[Shape] = [(33, 17), (17, 33), (40, 9), (9, 40)] * 35 + [(33,), (17,), (9,)] * 20
LISTS = {
    "140 matrices of 24 x 16, 60 vectors": (SMALL, 1.5),
    "140 odd matrices, tall and wide, 60 vectors": (ODD, 1.5),
    "one matrix of 24 x 16": ([(24, 16)], 2.0),
}
"""Parameters, and how many times the loop's time a step should take at most."""

STEPS = {"plain torch": (12, 250), "kernels": (15, 300)}
"""How many files a step should go through at most, and in how many calls."""

FIELDS = """kind subject optimizer ms ms_median ratio ratio_median target floor_bytes_ms
floor_flop_ms files calls changes most_files most_calls note copy_gb_s matmul_tflops device driver
torch triton package commit date threads""".split()  # noqa: SIM905


def made(shapes: list[Shape]) -> Sides:
    """Return parameters of some shapes, the same numbers each time."""
    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng)
    return Sides([p for p in params if p.ndim == 2], [p for p in params if p.ndim < 2])


def galore(sides: Sides, **settings: Any) -> GaLoreAdamW:
    """Return GaLore on matrices, AdamW on the rest, with no refresh after the first."""
    groups = [{"params": sides.matrices, "rank": RANK}, {"params": sides.rest, "rank": None}]
    filled = [group for group in groups if group["params"]]
    return GaLoreAdamW(filled, update_proj_gap=NEVER, **settings)


def adamw(sides: Sides, **form: bool) -> torch.optim.Optimizer:
    """Return torch's AdamW in one of its forms."""
    return torch.optim.AdamW([*sides.matrices, *sides.rest], **form)


OPTIMIZERS: dict[str, Callable[[Sides], torch.optim.Optimizer]] = {
    "adamw, loop": partial(adamw, foreach=False),
    "adamw, fused": partial(adamw, fused=True),
    "galore": galore,
}
BASELINE = "adamw, loop"


def in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return times of steps in ms: in each round every optimizer takes a few, the least counts."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            found = []
            for _ in range(3):
                start = time.thread_time()
                step()
                found.append(1e3 * (time.thread_time() - start))
            times[name].append(min(found))
    return times


def step_rows(subject: str, rounds: int, rates: Row) -> list[Row]:
    """Return a row for each optimizer on a list of parameters."""
    shapes, target = LISTS[subject]
    times = in_turns({name: build(made(shapes)).step for name, build in OPTIMIZERS.items()}, rounds)
    rows, loop = [], times[BASELINE]
    for name, ms in times.items():
        row = {"kind": "step", "subject": subject, "optimizer": name}
        row |= {"ms": f"{min(ms):.4g}", "ms_median": f"{median(ms):.4g}"}
        row |= {"ratio": f"{min(ms) / min(loop):.3f}"}
        row |= {"ratio_median": f"{median(a / b for a, b in zip(ms, loop, strict=True)):.3f}"}
        if name == "galore":
            total, flops = floor(METHODS["galore"], made(shapes), RANK, "float32")
            row |= {"target": target, "floor_bytes_ms": f"{total / rates['copy_gb_s'] / 1e6:.2g}"}
            row |= {"floor_flop_ms": f"{flops / rates['matmul_tflops'] / 1e9:.2g}"}
        rows.append(row)
    return rows


@dataclass
class Trail:
    """What a step goes through: calls of Python functions of this package and of its kernels."""

    calls: int = 0
    changes: int = 0
    last: str = ""

    def __post_init__(self) -> None:
        package = Path(lowrank_optim.__file__).parent
        self.roots = tuple(f"{package.parent / name}{os.sep}" for name in (package.name, "kernels"))
        self.files = set[str]()

    def see(self, frame: FrameType, event: str, argument: Any) -> None:
        """Count a call, except one that triton's interpreter makes in place of a device."""
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(self.roots) and not is_interpreted(frame):
            self.calls += 1
            self.changes += name != self.last
            self.last = name
            self.files.add(name)


def is_interpreted(frame: FrameType) -> bool:
    """Return whether a call is part of a kernel that runs in triton's interpreter."""
    above = frame.f_back
    while above is not None:
        if above.f_code.co_filename.endswith(os.path.join("triton", "runtime", "interpreter.py")):
            return True
        above = above.f_back
    return False


def traced(impl: str) -> dict[str, int]:
    """Return files, calls and changes of file of a third step, which refreshes nothing."""
    optimizer = galore(made(TRACED), impl=impl)
    for _ in range(2):
        optimizer.step()
    trail = Trail()
    sys.setprofile(trail.see)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return {"files": len(trail.files), "calls": trail.calls, "changes": trail.changes}


def trace_row(subject: str) -> Row:
    """Return the row of a path, traced in a process of its own, where kernels are interpreted."""
    impl = "triton" if subject == "kernels" else "eager"
    found = output_of(["-W", "ignore", __file__, "--trace", impl], {"TRITON_INTERPRET": "1"})
    most_files, most_calls = STEPS[subject]
    row = {"kind": "trace", "subject": subject, "optimizer": "galore"}
    row |= {"most_files": most_files, "most_calls": most_calls}
    return row | ({"note": found[1]} if found[1] else json.loads(found[0]))


IMPORT = """
import json, time
start = time.process_time()
import torch
middle = time.process_time()
import lowrank_optim
print(json.dumps([1e3 * (middle - start), 1e3 * (time.process_time() - middle)]))
"""


def import_rows(rounds: int) -> list[Row]:
    """Return a row for torch and one for this package, which comes after it."""
    runs = [json.loads(output_of(["-W", "ignore", "-c", IMPORT])[0]) for _ in range(rounds)]
    rows = []
    for place, name in enumerate(("torch", "lowrank_optim")):
        ms, base = [run[place] for run in runs], [run[0] for run in runs]
        row = {"kind": "import", "subject": name, "ms": f"{min(ms):.4g}"}
        row |= {"ms_median": f"{median(ms):.4g}", "ratio": f"{min(ms) / min(base):.3f}"}
        rows.append(row | {"ratio_median": f"{median(ms) / median(base):.3f}"})
    return rows


def output_of(arguments: list[str], more: dict[str, str] | None = None) -> tuple[str, str]:
    """Return what Python prints, and the last line of its errors if it fails."""
    env = os.environ | (more or {})
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    failed = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    return done.stdout, "".join(failed) or ("no output" if done.returncode else "")


def show(console: Console, rows: list[Row]) -> None:
    """Print the rows."""
    heads = ["what", "optimizer", "ms", "median", "x", "median", "at most", "bytes", "flops"]
    table = Table(title="Steps; x: times the loop; bytes, flops: floors, ms", box=box.SIMPLE_HEAD)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < 2 else "right")
    keys = ["subject", "optimizer", "ms", "ms_median", "ratio", "ratio_median", "target"]
    for row in rows:
        if row["kind"] != "trace":
            cells = [*keys, "floor_bytes_ms", "floor_flop_ms"]
            table.add_row(*(str(row.get(key, "")) for key in cells))
    console.print(table)
    for row in rows:
        if row["kind"] == "trace":
            found = row.get("note") or (
                f"{row['files']} files (at most {row['most_files']}), {row['calls']} calls "
                f"(at most {row['most_calls']}), {row['changes']} changes of file"
            )
            console.print(f"a step of {len(TRACED)} parameters, {row['subject']}: {found}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="of three steps by each optimizer")
    parser.add_argument("--imports", type=int, default=5, help="times that both are imported")
    parser.add_argument("--out", type=Path, help="csv to add the rows to")
    parser.add_argument("--trace", choices=["eager", "triton"], help="print one trace, no more")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and save; returns the exit status, which no time decides on."""
    args = parse(argv)
    torch.set_num_threads(1)
    if args.trace:
        print(json.dumps(traced(args.trace)))
        return 0
    rates = facts("cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row for subject in LISTS for row in step_rows(subject, args.rounds, rates)]
    rows += [trace_row(subject) for subject in STEPS]
    rows += import_rows(args.imports)
    for row in rows:
        if args.out is not None:
            append(dict.fromkeys(FIELDS, "") | rates | row, FIELDS, args.out)
    show(Console(highlight=False, width=120), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
