"""Measure the refresh of `Power` against the SVD on gradients of language models on bytes.

Gradients of a LLaMA of width 256 at the start, after 20 and after 220 steps, and of a one-layer
LLaMA of width 4096 at its first two steps, all on Python's standard library. For each: the energy
that `Power` captures as a share of the best, |G P|^2 / |G P_svd|^2, from nothing ("cold") and from
the basis of an earlier gradient ("warm"), how much its columns turn in one refresh (the mean of
|diag(P_old^T P_new)|), and its time against that of torch.linalg.svd in the same run, on the GPU
where there is one. Writes results/refresh.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lowrank_optim.demo.corpus import Corpus, load_corpus
from lowrank_optim.demo.train import Settings, batches, build_model, token_loss
from lowrank_optim.parts.projectors import Power
from lowrank_optim.parts.types import Matrix, Site

RESULTS = Path(__file__).parent / "results" / "refresh.csv"
SMALL = Settings(steps=221, batch=16, length=128, hidden=256, intermediate=688, layers=2, heads=4)
BIG = Settings(steps=2, batch=4, length=256, hidden=4096, intermediate=4096, layers=1, heads=32)
EVERY, RANKS = 200, (8, 16, 64)
BIG_RANK = 1024
SMALL_PARTS = ("0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.gate_proj", "1.mlp.down_proj")
BIG_PARTS = ("self_attn.o_proj", "mlp.gate_proj")
Gradients = dict[tuple[str, int], Tensor]


def main(argv: list[str] | None = None) -> None:
    """Collect gradients, measure, show and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-big", action="store_true", help="leave the 4096 x 4096 ones out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the csv to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    console = Console(highlight=False, soft_wrap=True)
    rows = list(measure(device, load_corpus(), big=not args.no_big))
    show(rows, console)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    console.print(f"{len(rows)} rows in {args.results}")


def measure(device: torch.device, corpus: Corpus, big: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each gradient, rank and start."""
    steps = (0, 20, 20 + EVERY)
    grads = gradients(SMALL, SMALL_PARTS, steps, corpus, device, 1e-3)
    for part in SMALL_PARTS:
        for old, new in ((None, 0), (None, 20), (20, 20 + EVERY)):
            before = None if old is None else grads[part, old]
            yield from compare(f"256 {part}", grads[part, new], before, new, RANKS)
    if not big:
        return
    grads = gradients(BIG, BIG_PARTS, (0, 1), corpus, device, 1e-4)
    for part in BIG_PARTS:
        yield from compare(f"4096 {part}", grads[part, 1], grads[part, 0], 1, (BIG_RANK,))


def gradients(
    settings: Settings,
    parts: tuple[str, ...],
    steps: tuple[int, ...],
    corpus: Corpus,
    device: torch.device,
    lr: float,
) -> Gradients:
    """Train and return gradients, the shorter axis last, by part and step."""
    model = build_model(settings).to(device)
    named = {part: parameter(model, part) for part in parts}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    found: Gradients = {}
    for step, tokens in enumerate(batches(corpus.train, settings)):
        optimizer.zero_grad()
        loss = token_loss(model, tokens.to(device)) / tokens[:, 1:].numel()
        loss.backward()  # type: ignore[no-untyped-call]
        if step in steps:
            for part, param in named.items():
                assert param.grad is not None
                grad = param.grad.detach().clone()
                found[part, step] = grad if grad.shape[0] >= grad.shape[1] else grad.mT
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step + 1 < settings.steps:
            optimizer.step()
    return found


def parameter(model: nn.Module, part: str) -> nn.Parameter:
    """Return the weight whose name ends with `part`."""
    return next(p for name, p in model.named_parameters() if name.endswith(f"{part}.weight"))


def compare(
    name: str, grad: Tensor, before: Tensor | None, step: int, ranks: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each rank: cold, and if given, warm from the basis of `before`."""
    once = grad.shape[-1] > 1024
    values: list[Tensor] = []

    def decompose() -> None:
        values[:] = [torch.linalg.svd(grad, full_matrices=False).S]

    svd_ms = milliseconds(decompose, grad.device, 1 if once else 5, warm_up=not once)
    energies = values[0].double().square()
    starts = [None] if before is None else [None, before]
    for rank, before in itertools.product(ranks, starts):
        site = Site(rank, grad.shape[-1], grad.dtype, grad.device)
        start = Power().init((), grad.dtype, site)
        if before is not None:
            Power().refresh([Matrix(before, start, site)])
            site.step = max(1, step)
        state: dict[str, Tensor] = {}

        def refresh(start: dict[str, Any] = start, site: Site = site) -> None:
            state["basis"] = start["basis"].clone()  # noqa: B023
            Power().refresh([Matrix(grad, state, site)])  # noqa: B023

        power_ms = milliseconds(refresh, grad.device, 3 if once else 10)
        best = energies[:rank].sum()
        turned = (start["basis"] * state["basis"]).sum(0).abs().mean()
        yield {
            "gradient": name,
            "step": step,
            "rows": grad.shape[0],
            "cols": grad.shape[1],
            "rank": rank,
            "start": "cold" if before is None else "warm",
            "best_share": f"{float(best / energies.sum()):.5f}",
            "energy_before": "" if before is None else f"{energy(grad, start) / float(best):.4f}",
            "energy": f"{energy(grad, state) / float(best):.5f}",
            "diagonal": "" if before is None else f"{float(turned):.3f}",
            "power_ms": f"{power_ms:.3f}",
            "svd_ms": f"{svd_ms:.1f}",
            "times_faster": f"{svd_ms / power_ms:.2f}",
            **surroundings(grad.device),
        }


def energy(grad: Tensor, state: dict[str, Tensor]) -> float:
    """Return `|G P|^2`, summed in float64."""
    return float((grad @ state["basis"]).double().square().sum())


def milliseconds(
    work: Callable[[], None], device: torch.device, repeats: int, warm_up: bool = True
) -> float:
    """Return the least time of a call: by the device's events on CUDA, else by the clock."""
    if warm_up:
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            first.record()
            work()
            last.record()
            torch.cuda.synchronize(device)
            times.append(float(first.elapsed_time(last)))
        else:
            started = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def surroundings(device: torch.device) -> dict[str, str]:
    """Return what the times depend on beside the code."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
        **provenance(),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a table."""
    columns = ["gradient", "step", "rank", "start", "best_share", "energy_before", "energy"]
    columns += ["diagonal", "power_ms", "svd_ms", "times_faster"]
    table = Table(title=f"Power against torch.linalg.svd on {rows[0]['device']}")
    for column in columns:
        table.add_column(column, justify="left" if column in ("gradient", "start") else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console.width = max(console.width, 140)
    console.print(table)


if __name__ == "__main__":
    main()
