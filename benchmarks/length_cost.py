"""What a length costs: a step with "rms" and "adamw" beside one at the published length.

Steps between refreshes, on the parameter lists of a LLaMA, in turns on one thread; a time is that
of the thread. Floors: without a sign, |U| takes one more pass over the direction, rows times rank
values; with a sign, where a basis drops what it is the sign of, two products more (4 m n r flops).

  python benchmarks/length_cost.py --out benchmarks/results/length_cost.csv
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import median

import torch
from peers import METHODS, NEVER, SIZES, Problem
from rich.console import Console
from rich.table import Table
from rows import append
from timing import facts

LENGTHS = ("published", "rms", "adamw")
NAMES = "galore dct-200 fira frugal apollo lowrank compensated muon normuon racs".split()  # noqa: SIM905
FIELDS = """method size layers rank length repeats ms ms_min ratio ratio_median state_bytes
copy_gb_s matmul_tflops device driver torch triton package commit date threads""".split()  # noqa: SIM905


def main(argv: list[str] | None = None) -> int:
    """Measure each method at each length, all on the whole list of parameters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="60m", choices=SIZES)
    parser.add_argument("--layers", type=int, default=2, help="of the model (%(default)s)")
    parser.add_argument("--rank", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--repeats", type=int, default=9, help="rounds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("length_cost.csv"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(highlight=False, width=100)
    about = facts("cpu", torch.float32)
    problem = Problem(args.size, args.layers, torch.float32, "cpu")
    table = Table("method", "length", "ms", "x published", "median", title="a step on a CPU")
    for name in args.methods:
        times = measured(problem, name, args.rank, args.repeats)
        plain = times["published"][0]
        for length, (ms, state) in times.items():
            ratio = min(ms) / min(plain)
            middle = median(a / b for a, b in zip(ms, plain, strict=True))
            row = {"method": name, "size": args.size, "layers": problem.layers, "rank": args.rank}
            row |= {"length": length, "repeats": len(ms), "ms": f"{median(ms):.4g}"}
            row |= {"ms_min": f"{min(ms):.4g}", "ratio": f"{ratio:.3f}"}
            row |= {"ratio_median": f"{middle:.3f}", "state_bytes": state, **about}
            append(row, FIELDS, args.out)
            table.add_row(name, length, f"{min(ms):.1f}", f"{ratio:.3f}", f"{middle:.3f}")
    console.print(table)
    return 0


def measured(
    problem: Problem, name: str, rank: int, rounds: int
) -> dict[str, tuple[list[float], int]]:
    """Return times of steps in ms by length, in turns, and the bytes of the states."""
    build, optimizers = METHODS[name].build, {}
    for length in LENGTHS:
        more = {} if length == "published" else {"length": length, "scale": 1.0}
        optimizer = build(problem.matrices, problem.rest, rank=rank, gap=NEVER, **more)
        optimizer.param_groups[1]["lr"] = 0.0
        for _ in range(2):
            optimizer.step()
        optimizers[length] = optimizer
    times: dict[str, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(rounds):
        for length, optimizer in optimizers.items():
            start = time.thread_time()
            optimizer.step()
            times[length].append(1e3 * (time.thread_time() - start))
    return {
        length: (ms, sum(state_of(optimizers[length]).values())) for length, ms in times.items()
    }


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Return the bytes of each tensor of the states."""
    return {
        id(value): value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }


if __name__ == "__main__":
    raise SystemExit(main())
