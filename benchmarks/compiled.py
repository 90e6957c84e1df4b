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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from lowrank_optim.kernels import dct
from lowrank_optim.kernels import length as measuring
from lowrank_optim.kernels import lift as lifting
from lowrank_optim.kernels import project as projection
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lowrank_optim import Update, functional, kernels

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHES = (90, 80)
BETAS, EPS = (0.9, 0.999), 1e-8
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


class Variant(NamedTuple):
    """One way to call a kernel.

    Attributes:
        kernel: its name.
        name: what tells it from others.
        call: calls the package's function.
    """

    kernel: str
    name: str
    call: Callable[[], Any]


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


def grid_of(rows: int, cols: int, dtype: torch.dtype, wide: bool) -> torch.Tensor:
    """Return a matrix, or a transposed view of one: never written, so it takes no memory."""
    return torch.empty(cols, rows, dtype=dtype).mT if wide else torch.empty(rows, cols, dtype=dtype)


def moment(shape: tuple[int, ...], state: str, squares: bool) -> functional.Stored:
    if state != "8bit":
        return torch.empty(shape, dtype=getattr(torch, state))
    scale = torch.empty(*shape[:-1], -(-shape[-1] // 256))
    return torch.empty(shape, dtype=torch.uint8), scale


def noise() -> list[functional.Noise]:
    return [functional.Noise((1 << 40) + 5, 7, functional.stream_of(3))]


def project(
    dtype: str,
    state: str,
    rank: int,
    wide: bool = False,
    norms: bool = False,
    indexed: bool = False,
) -> Variant:
    """Return a variant of the projection; `wide` is the transposed view of a wide matrix."""

    def call() -> None:
        rows, cols, kind = 4096, 4096, getattr(torch, dtype)
        grad = grid_of(rows, cols, kind, wide)
        factor = torch.arange(rank) if indexed else grid_of(cols, rank, kind, False)
        moments = [[moment((rows, rank), state, squares)] for squares in (False, True)]
        want = (norms, True, norms)
        kernels.project_moments([grad], [factor], *moments, [3], *BETAS, EPS, noise(), want)

    parts = [dtype, f"state {state}", f"r {rank}", "wide" if wide else "tall"]
    parts += ["norms"] * norms + ["columns"] * indexed
    return Variant("project", ", ".join(parts), call)


def lift(
    dtype: str,
    rank: int,
    wide: bool = False,
    update: Update = Update(direction=0.25),  # noqa: B008
    rounds: bool = False,
    indexed: bool = False,
    label: str = "galore",
    length: bool = False,
) -> Variant:
    """Return a variant of the lift."""

    def call() -> None:
        rows, cols, kind = 4096, 4096, getattr(torch, dtype)
        param, grad = (grid_of(rows, cols, kind, wide) for _ in range(2))
        factor = torch.arange(rank) if indexed else grid_of(cols, rank, kind, False)
        low = torch.empty(1, rows, rank, dtype=kind)
        numbers = -1e-3, 0.99, noise() if rounds else None, torch.ones(1) if length else None
        kernels.lift_write([param], [grad], [factor], low, low, update, *numbers)

    parts = [dtype, label, f"r {rank}", "wide" if wide else "tall"]
    parts += ["stochastic"] * rounds + ["columns"] * indexed + ["length"] * length
    return Variant("lift", ", ".join(parts), call)


def signs(dtype: str, rank: int, wide: bool = False, indexed: bool = False) -> Variant:
    """Return a variant of the norms of updates with a sign."""

    def call() -> None:
        rows, cols, kind = 4096, 4096, getattr(torch, dtype)
        grad = grid_of(rows, cols, kind, wide)
        factor = torch.arange(rank) if indexed else grid_of(cols, rank, kind, False)
        low = torch.empty(1, rows, rank, dtype=kind)
        kernels.sign_squares([grad], [factor], low, low, SIGN)

    parts = [dtype, f"r {rank}", "wide" if wide else "tall"] + ["columns"] * indexed
    return Variant("signs", ", ".join(parts), call)


def sample(dtype: str, rows: int, width: int, counted: bool = False) -> Variant:
    """Return a variant of the length of AdamW's step on a sample; counts may be on the device."""

    def call() -> None:
        grad = torch.empty(rows, 4096, dtype=getattr(torch, dtype))
        moments = [[torch.empty(rows, width)] for _ in range(2)]
        count = torch.tensor(3.0) if counted else 3
        kernels.sample_moments([grad], *moments, [5], [count], *BETAS, EPS)

    parts = [dtype, f"{width} a row"] + ["counted"] * counted
    return Variant("sample", ", ".join(parts), call)


def adam(dtype: str, state: str, rounds: bool = False) -> Variant:
    """Return a variant of the step of parameters that are not projected."""

    def call() -> None:
        shape, kind = (4096, 4096), getattr(torch, dtype)
        param, grad = (torch.empty(shape, dtype=kind) for _ in range(2))
        moments = [[moment(shape, state, squares)] for squares in (False, True)]
        kernels.adam_step([param], [grad], *moments, [3], *BETAS, EPS, -1e-3, 0.99, noise(), rounds)

    parts = [dtype, f"state {state}"] + ["stochastic"] * rounds
    return Variant("adam", ", ".join(parts), call)


def scores(dtype: str, cols: int) -> Variant:
    """Return a variant of the scores of a cosine basis."""

    def call() -> None:
        kernels.dct_scores([torch.empty(64, cols, dtype=getattr(torch, dtype))], "l1")

    return Variant("dct", f"{dtype}, {cols} columns", call)


def codes(squares: bool) -> Variant:
    """Return a variant of the conversion to 8 bits and back."""

    def call() -> None:
        x = torch.empty(4096, 4096)
        if squares:
            noise = functional.Noise(0, 1, 0)
            bits = kernels.random_bits(noise, 2, slice(0, x.shape[0]), x.shape[1], x.device)
            kernels.quantize_squares(x, bits)
            kernels.dequantize_squares(*moment(x.shape, "8bit", squares))
        else:
            kernels.quantize_blockwise(x)
            kernels.dequantize_blockwise(*moment(x.shape, "8bit", squares))

    return Variant("codes", "squares" if squares else "signed", call)


def columns(squares: bool, rank: int) -> Variant:
    """Return a variant of moving the columns of 8-bit moments."""

    def call() -> None:
        places, moments = torch.arange(rank).unsqueeze(0), [moment((4096, rank), "8bit", squares)]
        kernels.move_columns(moments, places, squares, noise(), 4)

    return Variant("columns", f"{'squares' if squares else 'signed'}, r {rank}", call)


FIRA = Update(direction=0.25, low=torch.empty(1, 4096, 1), grad=torch.empty(1, 4096, 1))
APOLLO = Update(grad=torch.empty(1, 4096, 1))
SIGN = Update(direction=1.0, sign=0.5)


def variants(every: bool) -> list[Variant]:
    """Return the main variants, or all of them."""
    half, wide = "bfloat16", {"wide": True}
    found = [
        project(half, "float32", 256),
        project(half, "float32", 128, **wide),
        project(half, "bfloat16", 1024, **wide, norms=True),
        project(half, "8bit", 256, norms=True),
        project("float32", "float32", 128, **wide),
        lift(half, 256, rounds=True),
        lift(half, 1024, **wide, update=FIRA, label="fira", rounds=True),
        lift(half, 128, update=SIGN, label="frugal"),
        lift(half, 256, update=SIGN, label="frugal", length=True),
        lift("float32", 128),
        signs(half, 256),
        signs(half, 1024, **wide),
        sample(half, 4096, 1),
        sample(half, 100, 11, True),
        adam(half, "float32", True),
        adam(half, "8bit", True),
        codes(False),
        codes(True),
        columns(False, 1024),
        columns(True, 1024),
        scores(half, 4096),
    ]
    if not every:
        return found
    for rank in (128, 256, 512, 1024):
        for state in ("float32", "bfloat16", "8bit"):
            found += [project(half, state, rank, wide=w) for w in (False, True)]
        found += [lift(half, rank, wide=w, rounds=r) for w in (False, True) for r in (False, True)]
        found += [
            lift(half, rank, update=u, label=n) for u, n in ((FIRA, "fira"), (SIGN, "frugal"))
        ]
    for state in ("float32", "bfloat16", "8bit"):
        found += [project(half, state, 256, wide=w, norms=True) for w in (False, True)]
        found += [project("float32", state, 256), adam("float32", state), adam(half, state)]
        found.append(project(half, state, 256, norms=True, indexed=True))
    found += [
        project("float16", "float32", 256),
        lift("float32", 256, update=SIGN, label="frugal"),
        lift(half, 1024, length=True, rounds=True),
        signs("float32", 256),
        signs(half, 256, indexed=True),
        lift(half, 256, update=APOLLO, label="apollo", rounds=True),
        lift(half, 256, **wide, update=SIGN, label="frugal", rounds=True),
        lift(half, 256, update=SIGN, label="frugal", rounds=True, indexed=True),
        *(scores(kind, cols) for kind in (half, "float32") for cols in (512, 2048, 4096, 8192)),
    ]
    return list({(v.kernel, v.name): v for v in found}.values())


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
