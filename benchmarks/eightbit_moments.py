"""Compare ways to store Adam's exp_avg_sq in 8 bits with float32 moments, on made gradients.

Every candidate sees the same gradients as float32 moments do. exp_avg is stored in the signed
dynamic map, rounded to nearest, except where the name ends in "bnb": there by bitsandbytes' own
kernel for a CPU, which rounds to 65536 equal steps first. One row for each kind of gradients and
candidate goes to results/eightbit_moments.csv:

- step: the largest |N| over that of float32, N = mhat / (sqrt(vhat) + 1e-8); n_error: rms of the
  difference of N over rms of N; root_bias, root_rms: of sqrt(vhat) over float32's, minus 1
- v2000_01 .. v5000_99: V over float32's, percentiles, so many steps after the change
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowrank_optim.functional import blockwise as b

RESULTS = Path(__file__).parent / "results" / "eightbit_moments.csv"
BLOCKS, STEPS, WARMUP = 8, 3000, 2000
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
QUANTILES, MARKS = torch.tensor((0.01, 0.5, 0.99)), (2000, 5000)
TRACKED = [f"v{mark}_{percent}" for mark in MARKS for percent in ("01", "50", "99")]
FIELDS = ["gradients", "candidate", "step", "n_error", "root_bias", "root_rms", *TRACKED]
Store = Callable[[Tensor, Tensor], Tensor]
Make = Callable[[tuple[int, ...], float, torch.Generator], Iterator[Tensor]]


def nearest(v: Tensor, noise: Tensor, least: int = 1) -> Tensor:
    """(a, b) V, nearest, at least the smallest positive code where V > 0."""
    codes, scale = b.quantize_blockwise(v, False)
    return b.dequantize_blockwise(floor(codes, v, least), scale, False)


def root(v: Tensor, noise: Tensor) -> Tensor:
    """(c) sqrt(V), nearest, floor."""
    codes, scale = b.quantize_blockwise(v.sqrt(), False)
    return b.dequantize_blockwise(floor(codes, v), scale, False).square()


def stochastic(v: Tensor, noise: Tensor) -> Tensor:
    """(d) V, to a neighbour with the expectation of V, floor."""
    codes, scale = b._between(v, b.dynamic_map(False, v.device), noise)
    return b.dequantize_blockwise(floor(codes, v), scale, False)


def squares(v: Tensor, noise: Tensor, least: int = b.FLOOR) -> Tensor:
    """(e) codes of sqrt(V), to a neighbour with the expectation of V, floor."""
    return b.dequantize_squares(*b.quantize_squares(v, noise, least))


def library(v: Tensor, noise: Tensor) -> Tensor:
    """V by bitsandbytes' kernel."""
    return by_library(v, False)


def by_library(x: Tensor, signed: bool) -> Tensor:
    """Store and load by bitsandbytes' kernel for a CPU."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    kept = quantize_blockwise(x, code=b.dynamic_map(signed, x.device), blocksize=b.BLOCK)
    return dequantize_blockwise(*kept)


def floor(codes: Tensor, v: Tensor, least: int = 1) -> Tensor:
    """No code below `least` where V > 0."""
    return torch.where(v > 0, codes.clamp_min(least), codes)


CANDIDATES: dict[str, tuple[Store, bool]] = {
    "a V": (partial(nearest, least=0), False),
    "b V floor": (nearest, False),
    "c root floor": (root, False),
    "d V stochastic": (stochastic, False),
    "e root stochastic": (partial(squares, least=1), False),
    "e, floor at code 6": (squares, False),
    "e, floor at code 6, M bnb": (squares, True),
    "V bnb, M bnb": (library, True),
}


def plain(shape: tuple[int, ...], spread: float, rng: torch.Generator) -> Iterator[Tensor]:
    """Gaussian gradients; their scales in a block are log-uniform in `spread`..1."""
    scales = spread ** torch.rand(shape, generator=rng)
    while True:
        yield scales * torch.randn(shape, generator=rng)


def heavy(shape: tuple[int, ...], spread: float, rng: torch.Generator) -> Iterator[Tensor]:
    """Gradients with tails of index 2, whose variance is infinite."""
    for grad in plain(shape, spread, rng):
        yield grad * torch.rand(shape, generator=rng).clamp_min(1e-7).rsqrt()


def sparse(shape: tuple[int, ...], spread: float, rng: torch.Generator) -> Iterator[Tensor]:
    """Gradients at every 50th step of an element, each at its own; at none for an eighth."""
    phase = torch.randint(0, 50, shape, generator=rng)
    phase[:, ::8] = -1
    for step, grad in enumerate(plain(shape, spread, rng)):
        yield torch.where(phase == step % 50, grad, 0.0)


def changed(shape: tuple[int, ...], factor: float, rng: torch.Generator) -> Iterator[Tensor]:
    """Gradients of spread 0.1, every second of them times `factor` from step WARMUP on."""
    factors = torch.ones(shape)
    for step, grad in enumerate(plain(shape, 0.1, rng)):
        if step == WARMUP:
            factors[:, ::2] = factor
        yield grad * factors


KINDS: dict[str, tuple[Make, float]] = {
    "scale 1": (plain, 1),
    "scales 1e-1..1": (plain, 1e-1),
    "scales 1e-3..1": (plain, 1e-3),
    "scales 1e-6..1": (plain, 1e-6),
    "heavy tails": (heavy, 1e-1),
    "sparse": (sparse, 1e-1),
    "half shrinks tenfold": (changed, 0.1),
    "half grows twofold": (changed, 2.0),
}


def simulate(kind: str, seed: int) -> list[list[str]]:
    """Run all candidates on the same gradients; returns the rows."""
    rng = torch.Generator().manual_seed(seed)
    make, number = KINDS[kind]
    shape = (BLOCKS, b.BLOCK)
    zero = exact_m = exact_v = torch.zeros(shape)
    means = {False: zero, True: zero}
    states = dict.fromkeys(CANDIDATES, zero)
    peak = power = 0.0
    peaks, errors = dict.fromkeys(CANDIDATES, 0.0), dict.fromkeys(CANDIDATES, 0.0)
    tracked: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    roots: dict[str, list[Tensor]] = {name: [] for name in CANDIDATES}
    steps = WARMUP + MARKS[-1] if make is changed else STEPS
    for step, grad in enumerate(make(shape, number, rng), 1):
        noise = torch.randint(0, b.LEVELS, shape, dtype=torch.int32, generator=rng)
        exact_m, exact_v = exact_m.lerp(grad, 1 - BETA1), average(exact_v, grad)
        truth = direction(exact_m, exact_v, step)
        peak = max(peak, float(truth.abs().max()))
        power += float(truth.square().sum())
        fresh = {bnb: mean.lerp(grad, 1 - BETA1) for bnb, mean in means.items()}
        means[False] = b.dequantize_blockwise(*b.quantize_blockwise(fresh[False], True), True)
        means[True] = by_library(fresh[True], True)
        seen = exact_v > 0
        for name, (store, bnb) in CANDIDATES.items():
            # the step is made of the stored values, to see their errors whole
            v = states[name] = store(average(states[name], grad), noise)
            taken = direction(means[bnb], v, step)
            peaks[name] = max(peaks[name], float(taken.abs().max()))
            errors[name] += float((taken - truth).square().sum())
            if step > steps - 1000 and step % 100 == 0:
                roots[name].append((v / exact_v)[seen].sqrt() - 1)
            if make is changed and step - WARMUP in MARKS:
                tracked[name] += (v / exact_v)[:, ::2].flatten().quantile(QUANTILES).tolist()
        if step == steps:
            break
    rows = []
    for name in CANDIDATES:
        root = torch.cat(roots[name])
        figures = [peaks[name] / peak, (errors[name] / power) ** 0.5]
        figures += [float(root.mean()), float(root.square().mean().sqrt()), *tracked[name]]
        rows.append([kind, name, *(f"{figure:.3g}" for figure in figures)])
    return rows


def average(v: Tensor, grad: Tensor) -> Tensor:
    """The next average of squares."""
    return v * BETA2 + (1 - BETA2) * grad.square()


def direction(m: Tensor, v: Tensor, step: int) -> Tensor:
    """N, Adam's direction."""
    return m / (1 - BETA1**step) / ((v / (1 - BETA2**step)).sqrt() + EPS)


def main(argv: list[str] | None = None) -> None:
    """Simulate, write the rows, show them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the csv to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for kind in KINDS for row in simulate(kind, args.seed)]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    table = Table(*FIELDS)
    for at, row in enumerate(rows, 1):
        table.add_row(*row, end_section=at % len(CANDIDATES) == 0)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
