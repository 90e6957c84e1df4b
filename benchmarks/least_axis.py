"""What a rank of a quarter costs where axes are short: adapters on a small language model.

A LLaMA over bytes is trained with AdamW, then frozen, and adapters B A of every linear layer are
trained on the same texts with letters exchanged: A is (axis, width), B (out, axis). One row for
each length of the axis and each method: the loss on held-out texts, mean and range over seeds, at
the best of some rates, and the state. `min_dim` is 1 here, so that all is projected.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim
from lowrank_optim import LowRank, state_bytes
from lowrank_optim.demo.corpus import load_corpus
from lowrank_optim.demo.train import (
    Settings,
    batches,
    build_model,
    evaluate,
    rate,
    token_loss,
    validation_windows,
)

METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "AdamW": ("AdamW", {}, (3e-3, 1e-2, 3e-2)),
    "GaLore": ("GaLoreAdamW", {"update_proj_gap": 50}, (1e-2, 3e-2, 1e-1)),
    "FRUGAL": ("FrugalAdamW", {"update_proj_gap": 50}, (3e-4, 1e-3, 3e-3)),
}
"""Class, settings, and the rates of which the best counts."""


class Adapter(nn.Module):
    """A frozen layer, and a product of two narrow matrices beside it."""

    def __init__(self, layer: nn.Linear, axis: int) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Linear(layer.in_features, axis, bias=False)
        self.b = nn.Linear(axis, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = self.b(self.a(x))
        return self.layer(x) + low


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Tensor], steps: int
) -> None:
    """Train on batches of bytes, clipped, along the demo's schedule."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for tokens in data:
        optimizer.zero_grad()
        (token_loss(model, tokens) / tokens[:, 1:].numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def adapt(model: nn.Module, axis: int) -> list[nn.Parameter]:
    """Freeze a model, put adapters on the layers of its body, and return their weights."""
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Adapter(layer, axis))
    return [param for name, param in model.named_parameters() if ".a." in name or ".b." in name]


def run(
    base: dict[str, Tensor], method: str, lr: float, axis: int, data: Any, settings: Settings
) -> tuple[float, int]:
    """Return the loss of adapters after training, and the bytes of their state."""
    name, own, _ = METHODS[method]
    model = build_model(settings)
    model.load_state_dict(base)
    torch.manual_seed(settings.seed)
    params = adapt(model, axis)
    if name == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, lr=lr)
    else:
        make: type[LowRank] = getattr(lowrank_optim, name)
        optimizer = make(params, lr=lr, rank=0.25, min_dim=1, **own)
    fit(model, optimizer, batches(data[0], settings), settings.steps)
    return evaluate(model, data[1], settings.batch), state_bytes(optimizer)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args(argv)
    settings = Settings(
        steps=args.steps, batch=8, length=64, hidden=args.width, intermediate=args.width * 2,
        layers=2, heads=4, windows=128,
    )  # fmt: skip
    corpus = load_corpus()
    exchange = torch.arange(256, dtype=torch.uint8)
    letters = torch.arange(97, 123)
    exchange[letters] = letters.flip(0).to(torch.uint8)
    held = validation_windows(exchange[corpus.validation.long()], settings.length, settings.windows)
    data = (exchange[corpus.train.long()], held)
    model = build_model(settings)
    longer = replace(settings, steps=3 * settings.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fit(model, optimizer, batches(corpus.train, longer), longer.steps)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    print(f"before adapters: {evaluate(model, held, settings.batch):.3f} nats a byte")
    print(f"{'axis':>5} {'method':<8} {'loss':>7} {'range':>15} {'lr':>7} {'state KiB':>10}")
    for axis in args.axes:
        for method in args.methods:
            best, line = math.inf, ""
            for lr in METHODS[method][2]:
                runs = [
                    run(base, method, lr, axis, data, replace(settings, seed=seed))
                    for seed in range(args.seeds)
                ]
                losses = [loss for loss, _ in runs]
                if (mean := statistics.fmean(losses)) < best:
                    best = mean
                    span = f"{min(losses):.3f} - {max(losses):.3f}"
                    kib = runs[0][1] / 1024
                    line = f"{axis:>5} {method:<8} {mean:>7.3f} {span:>15} {lr:>7.0e} {kib:>10.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
