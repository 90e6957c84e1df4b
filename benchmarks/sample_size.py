"""How many entries tell the length of AdamW's step: the error of its RMS, and the loss with it.

`length="adamw"` measures the root mean square of AdamW's update on a sample of a matrix. Here AdamW
trains a task of `pretrain.py`, and in every tenth step the sample's value is compared with that of
all entries, for samples of several sizes, laid out as in the package. Then NorMuon is trained with
each size.

  python benchmarks/sample_size.py --out benchmarks/results/sample_size.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch
from pretraining import data
from pretraining.methods import Spec, build_optimizer
from pretraining.runner import WORK
from pretraining.tasks import TASKS, build_model
from pretraining.train import batch, mean_loss, train
from rich.console import Console
from rows import append
from timing import facts
from torch import Tensor, nn

from lowrank_optim.demo.train import rate
from lowrank_optim.functional import sample_columns
from lowrank_optim.parts import length

SIZES = (256, 1024, 4096, 16384)
EVERY = 10
FIELDS = """kind task steps lr rest_lr entries matrices values error error_95 bias first_error loss
copy_gb_s matmul_tflops device driver torch triton package commit date threads""".split()  # noqa: SIM905


def main(argv: list[str] | None = None) -> int:
    """Write the rows of one run of AdamW, and of one of NorMuon for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", default="bytes-128", choices=TASKS)
    parser.add_argument("--steps", type=int, help="of each run; the task's otherwise")
    parser.add_argument("--lr", type=float, default=3e-3, help="of matrices (%(default)s)")
    parser.add_argument("--rest-lr", type=float, default=3e-2, help="of the rest (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="to compare")
    parser.add_argument("--losses", type=int, nargs="*", default=SIZES, help="sizes to train with")
    parser.add_argument("--out", type=Path, default=Path("sample_size.csv"))
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the tokens")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    task, steps = TASKS[args.task], args.steps or TASKS[args.task].steps
    spec = Spec(
        args.task, "adamw", "tune", 0, steps, args.lr, args.rest_lr, weight_decay=task.weight_decay
    )
    text = data.load(task.vocab, task.text << 20, args.work, "stdlib")
    shared = {"task": args.task, "steps": steps, "lr": args.lr, "rest_lr": args.rest_lr}
    shared |= facts("cpu", torch.float32)
    for row in errors(spec, text, args.sizes) if args.sizes else ():
        append({"kind": "error", **shared, **row}, FIELDS, args.out)
        console.print(row)
    entries = length.ENTRIES
    for size in args.losses:
        length.ENTRIES = size
        run = spec._replace(method="normuon", rank=1.0, change='length="adamw"')
        loss = train(run, "cpu", args.work, text=text).loss
        row = {"kind": "loss", **shared, "entries": size, "loss": f"{loss:.5f}"}
        append(row, FIELDS, args.out)
        console.print(f"NorMuon, {size} entries: {loss:.4f}")
    length.ENTRIES = entries
    return 0


def errors(spec: Spec, text: data.Data, sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Train AdamW and yield for each size how far samples were off, over matrices and steps."""
    task = TASKS[spec.task]
    model = build_model(task, spec.seed, "float32", "cpu")
    optimizer = build_optimizer(spec, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, spec.steps))
    matrices = optimizer.param_groups[0]["params"]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for step in range(1, spec.steps + 1):
        optimizer.zero_grad()
        mean_loss(model, batch(text.splits["train"], task, spec.seed, step)).backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        schedule.step()
        if step % EVERY and step > EVERY:
            continue
        for position, param in enumerate(matrices):
            direction = adams(optimizer, param)
            exact = direction.square().mean().sqrt()
            for size in sizes:
                off = float(sampled(direction, size, position) / exact) - 1
                found[size].append(off)
    for size, offs in found.items():
        sizes_of = [abs(off) for off in offs]
        yield {
            "entries": size,
            "matrices": len(matrices),
            "values": len(offs),
            "error": f"{fmean(sizes_of):.5f}",
            "error_95": f"{quantiles(sizes_of, n=20)[-1]:.5f}",
            "bias": f"{fmean(offs):+.5f}",
            "first_error": f"{fmean(sizes_of[: EVERY * len(matrices)]):.5f}",
        }


def adams(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor:
    """Return the direction of AdamW's last step, with the longer axis first."""
    state, group = optimizer.state[param], optimizer.param_groups[0]
    (beta1, beta2), count = group["betas"], int(state["step"])
    mean = state["exp_avg"] / (1 - beta1**count)
    root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
    direction: Tensor = mean / root
    return direction if param.shape[0] >= param.shape[1] else direction.mT


def sampled(direction: Tensor, size: int, position: int) -> Tensor:
    """Return the root mean square of a sample: some entries a row, as the package takes them."""
    rows, cols = direction.shape
    width = min(cols, max(1, -(-size // rows)))
    columns = sample_columns(rows, cols, width, 7919 * position)
    return direction.gather(1, columns).square().mean().sqrt()


if __name__ == "__main__":
    raise SystemExit(main())
