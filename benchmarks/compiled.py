"""Compile the kernels for GPUs that need not be there, and show what they take of them.

The launches are those of the package: its own functions are called, with tensors that are never
written, and what would be launched is compiled for each target instead. Compiler and assembler come
with triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from kernel_variants import Variant, variants
from lowrank_optim.kernels import dct
from lowrank_optim.kernels import length as measuring
from lowrank_optim.kernels import lift as lifting
from lowrank_optim.kernels import project as projection
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHES = (90, 80)
COUNTED = {
    "wgmma": r"\bHGMMA\.",
    "mma": r"\b[HB]?MMA\.|\bHMMA",
    "fma": r"\bFFMA",
    "copy16": r"\bLDGSTS\.\S*128",
    "copy": r"\bLDGSTS",
    "load16": r"\bLDG\.\S*128",
    "load": r"\bLDG\.",
    "store16": r"\bSTG\.\S*128",
    "store": r"\bSTG\.",
    "spilled": r"\b(LDL|STL)",
}
"""What is counted among the instructions, by pattern."""


class Launch(NamedTuple):
    """What a launch would give the compiler."""

    fn: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


class Resources(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread: spilled registers.
        shared: bytes of shared memory of a program.
        warps: of a program.
        counts: instructions by kind, see `COUNTED`; "all" of them.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    counts: dict[str, int]


def launches(variant: Variant, arch: int) -> list[Launch]:
    """Return what a variant would launch on an architecture."""
    found: list[Launch] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(self, args, options))

    run, made = JITFunction.run, dct.cosines

    def cosines(n: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Give the tables in the type that they have on a GPU."""
        w, t, m = made(n, dtype, device)
        first = torch.float16 if dtype == torch.float16 else torch.bfloat16
        return w.to(first), t, m.to(torch.bfloat16)

    room, roomy = projection.roomy, (projection, lifting, measuring)
    JITFunction.run, dct.cosines = note, cosines
    for module in roomy:
        module.roomy = lambda device: arch >= 90
    try:
        variant.call()
    finally:
        JITFunction.run, dct.cosines = run, made
        for module in roomy:
            module.roomy = room
    return found


def specialized(launch: Launch, arch: int) -> tuple[Any, ...]:
    """Return options, signature, constants and attributes, as a launch on a GPU finds them."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    fn = launch.fn
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    options = {"debug": False, **launch.options}
    bound, specialization, rest = binder(*launch.args, **options)
    return fn._pack_args(backend, options, bound, specialization, rest)


def compile_for(launch: Launch, arch: int) -> Any:
    """Return a launch's kernel, compiled for an architecture."""
    options, signature, constants, attributes = specialized(launch, arch)
    source = ASTSource(launch.fn, signature, constants, attributes)
    return triton.compile(source, GPUTarget("cuda", arch, 32), options.__dict__)


def resources(kernel: Any) -> Resources:
    """Return what a compiled kernel takes, read off its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOL, kind, file.name], capture_output=True, text=True, check=True
            ).stdout
            for kind in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK"))
    lines = [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]
    counts = {k: sum(bool(re.search(p, x)) for x in lines) for k, p in COUNTED.items()}
    counts["all"] = len(lines)
    meta = kernel.metadata
    return Resources(registers, stack, meta.shared, meta.num_warps, counts)


def measure(job: tuple[int, int, bool]) -> list[tuple[str, Resources]]:
    """Return what the launches of a variant, named by its place, take on an architecture."""
    place, arch, every = job
    found = launches(variants(every)[place], arch)
    return [(x.fn.__name__, resources(compile_for(x, arch))) for x in found]


def rows_of(arches: list[int], every: bool, only: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel, variant and architecture."""
    chosen = [
        (i, arch, v)
        for i, v in enumerate(variants(every))
        for arch in arches
        if re.search(only, f"{v.kernel} {v.name}")
    ]
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        results = pool.map(measure, [(i, arch, every) for i, arch, _ in chosen])
        for (_, arch, variant), found in zip(chosen, results, strict=True):
            for name, taken in found:
                row = {"kernel": name, "variant": variant.name, "arch": arch, **taken._asdict()}
                row.update(row.pop("counts"))
                yield row


def main(argv: list[str] | None = None) -> None:
    """Compile and show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES), help="90 for sm_90")
    parser.add_argument("--all", action="store_true", help="all variants, not only the main ones")
    parser.add_argument("--only", default="", help="a pattern: which kernels and variants")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, no table")
    args = parser.parse_args(argv)
    rows = rows_of(args.arch, args.all, args.only, args.jobs)
    if args.json:
        json.dump(list(rows), sys.stdout)
        return
    names = ["kernel", "variant", "arch", "registers", "stack", "shared", "warps", "all", *COUNTED]
    table = Table(*names)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
