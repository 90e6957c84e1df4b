"""Ways to call the kernels, for `compiled.py`: with tensors that are never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lowrank_optim import Update, functional, kernels

BETAS, EPS = (0.9, 0.999), 1e-8


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
