"""One training run of a small LLaMA on bytes, with every optimizer step timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.memory import shared_bytes, state_bytes
from ..groups import param_groups
from ..optimizer import LowRank
from .corpus import Corpus
from .recipes import Recipe, build_optimizer


@dataclass(frozen=True)
class Settings:
    """What all methods of one demo share: the run, the data order and the model's shape.

    Args:
        steps, batch, length: optimizer steps, windows a step, and bytes a window.
        rank: columns of the subspaces, or a share of the shorter axis in (0, 1].
        seed: of the weights, the batches and the random projectors.
        curve_windows, windows: validation windows for a point of the curve, and for the result.
    """

    steps: int = 150
    batch: int = 16
    length: int = 128
    rank: int | float = 48
    seed: int = 0
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    curve_points: int = 10
    curve_windows: int = 48
    windows: int = 384


@dataclass(frozen=True)
class Point:
    """Losses after a step, in nats a byte: train is the mean since the point before."""

    step: int
    train: float | None
    validation: float


@dataclass(frozen=True)
class Run:
    """What one method did: losses in nats a byte, state in bytes, times in milliseconds.

    `shared_bytes` are bases that layers share: made when needed, no part of the state.
    """

    name: str
    label: str
    lr: float
    rest_lr: float
    validation_loss: float
    state_bytes: int
    shared_bytes: int
    step_ms: float
    first_step_ms: float
    slowest_step_ms: float
    training_step_ms: float
    parameters: int
    curve: tuple[Point, ...]


def build_model(settings: Settings) -> nn.Module:
    """Make a LLaMA over bytes, untied, with weights that depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def check(recipes: Sequence[Recipe], settings: Settings) -> None:
    """Build all optimizers over a model without values.

    Raises:
        ValueError: one cannot be built, or the rank leaves nothing to project.
    """
    with torch.device("meta"):
        model = build_model(settings)
    param_groups(model, rank=settings.rank)  # also where all methods take whole matrices
    for recipe in recipes:
        build_optimizer(recipe, model, rank=settings.rank, steps=settings.steps, seed=settings.seed)


def train(
    recipe: Recipe,
    corpus: Corpus,
    settings: Settings,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Run:
    """Train from the seed's weights on the seed's batches, and measure.

    Args:
        on_step: called after each step with its number, from 1, and its training loss.
    """
    model = build_model(settings)
    optimizer = build_optimizer(
        recipe, model, rank=settings.rank, steps=settings.steps, seed=settings.seed
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    held = validation_windows(corpus.validation, settings.length, settings.windows)
    some = held[:: max(1, math.ceil(held.shape[0] / settings.curve_windows))]
    every = max(1, settings.steps // settings.curve_points)
    curve = [Point(0, None, evaluate(model, some, settings.batch))]
    losses: list[float] = []
    update_ms: list[float] = []
    whole_ms: list[float] = []
    for step, tokens in enumerate(batches(corpus.train, settings), start=1):
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = token_loss(model, tokens) / tokens[:, 1:].numel()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ready = time.perf_counter()
        optimizer.step()
        done = time.perf_counter()
        schedule.step()
        update_ms.append(1e3 * (done - ready))
        whole_ms.append(1e3 * (done - started))
        losses.append(loss.item())
        if step % every == 0 or step == settings.steps:
            mean = statistics.fmean(losses[curve[-1].step :])
            curve.append(Point(step, mean, evaluate(model, some, settings.batch)))
        on_step(step, losses[-1])
    return Run(
        name=recipe.name,
        label=recipe.label,
        lr=recipe.lr,
        rest_lr=recipe.rest_lr,
        validation_loss=evaluate(model, held, settings.batch),
        state_bytes=state_bytes(optimizer),
        shared_bytes=shared_bytes(optimizer) if isinstance(optimizer, LowRank) else 0,
        step_ms=statistics.median(update_ms),
        first_step_ms=update_ms[0],
        slowest_step_ms=max(update_ms),
        training_step_ms=statistics.median(whole_ms),
        parameters=sum(p.numel() for p in model.parameters()),
        curve=tuple(curve),
    )


def warm_up(recipe: Recipe, corpus: Corpus, settings: Settings) -> None:
    """Run two discarded steps on a tiny model, so that no method pays for loading libraries."""
    tiny = replace(
        settings, steps=2, batch=2, rank=4, hidden=16, intermediate=32, layers=1, heads=2, windows=2
    )
    train(recipe, corpus, tiny)


def rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: linear over the first tenth, then cosine down to a tenth.

    Args:
        step: steps already taken, from 0.
    """
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def batches(data: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Yield int64 windows (batch, length + 1) at random places, one batch a step."""
    generator = torch.Generator().manual_seed(settings.seed)
    reach = torch.arange(settings.length + 1)
    for _ in range(settings.steps):
        starts = torch.randint(
            data.numel() - settings.length, (settings.batch, 1), generator=generator
        )
        yield data[starts + reach].long()


def validation_windows(data: Tensor, length: int, most: int) -> Tensor:
    """Cut up to `most` evenly spread windows (windows, length + 1) whose targets are disjoint."""
    windows = data.unfold(0, length + 1, length)
    spread = torch.linspace(0, windows.shape[0] - 1, min(most, windows.shape[0]))
    return windows[spread.long()].long()


def token_loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the summed cross entropy in nats of each window's bytes after the first, shape ()."""
    logits: Tensor = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Return the mean loss in nats a byte over all bytes of the windows, for any batch size."""
    model.eval()
    total = math.fsum(
        token_loss(model, windows[start : start + batch]).item()
        for start in range(0, windows.shape[0], batch)
    )
    model.train()
    return total / windows[:, 1:].numel()
