"""One run: from a spec to its final loss, its curve and its bytes, resumable bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_optim import LowRank, state_bytes
from lowrank_optim.engine.memory import shared_bytes

from . import data
from .methods import Spec, build_optimizer
from .tasks import SCHEDULES, TASKS, Task, build_model

SAVE_EVERY = 60.0
"""Seconds between two checkpoints of a run."""


class OutOfTimeError(Exception):
    """The budget is over; the run is saved and goes on when it is started again."""


@dataclass
class Progress:
    """What of a run is not in the model or the optimizer.

    Attributes:
        seconds: wall time of the steps so far, evaluation left out.
        sums: training losses since the last point of the curve.
        curve: (step, mean training loss since the point before, held-out loss), nats a token.
    """

    step: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What came out; a loss that is not finite ended the run.

    Attributes:
        loss: mean over all tokens of the held-out windows at the end of the schedule, nats a token.
        state: bytes of all tensors that the optimizer keeps, shared bases included.
        peak: largest memory allocated on a GPU, bytes; 0 without one.
        text: name of the text.
    """

    spec: Spec
    loss: float
    curve: list[tuple[int, float, float]]
    state: int
    parameters: int
    seconds: float
    peak: int
    text: str


def train(
    spec: Spec,
    device: str,
    work: Path,
    deadline: float = math.inf,
    source: str = "machine",
    text: data.Data | None = None,
) -> Result:
    """Train as the spec says.

    Args:
        device: "cpu" or "cuda".
        work: folder of the tokens' cache and of unfinished runs.
        deadline: `time.monotonic()` after which the run is saved and left.
        source: of the text, see `data.load`.
        text: in its place.

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    task = TASKS[spec.task]
    text = text or data.load(task.vocab, task.text << 20, work, source)
    model = build_model(task, spec.seed, spec.weights, device)
    optimizer = build_optimizer(spec, model)
    share = SCHEDULES[task.schedule]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, spec.steps))
    saved = work / f"run-{hashlib.sha256(repr((spec, source)).encode()).hexdigest()[:16]}.pt"
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    progress = restore(saved, parts)
    held = windows(text.splits[spec.split], task.length, task.windows).to(device)
    some = held[:: max(1, math.ceil(len(held) / task.curve_windows))]
    every = max(1, spec.steps // task.points)
    last_saved = started = time.monotonic()
    for step in range(progress.step + 1, spec.steps + 1):
        tokens = batch(text.splits["train"], task, spec.seed, step).to(device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=task.mixed):
            loss = mean_loss(model, tokens)
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        schedule.step()
        progress.step = step
        progress.sums.append(loss.item())
        progress.seconds += time.monotonic() - started
        if not math.isfinite(progress.sums[-1]):
            break
        if step % every == 0 or step == spec.steps:
            mean = math.fsum(progress.sums) / len(progress.sums)
            progress.curve.append((step, mean, evaluate(model, some, task)))
            progress.sums.clear()
        started = time.monotonic()
        if started > deadline and step < spec.steps:
            save(saved, parts, progress)
            raise OutOfTimeError(f"{spec.method} stopped after step {step} of {spec.steps}")
        if started - last_saved > SAVE_EVERY:
            save(saved, parts, progress)
            last_saved = started = time.monotonic()
    loss_now = evaluate(model, held, task)
    saved.unlink(missing_ok=True)
    return Result(
        spec,
        loss_now if progress.step == spec.steps and math.isfinite(loss_now) else math.inf,
        progress.curve,
        state_bytes(optimizer) + (shared_bytes(optimizer) if isinstance(optimizer, LowRank) else 0),
        sum(param.numel() for param in model.parameters()),
        progress.seconds,
        torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        text.name,
    )


def save(path: Path, parts: dict[str, Any], progress: Progress) -> None:
    """Write everything that the rest of a run depends on, or nothing."""
    unfinished = path.with_suffix(".tmp")
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**state, "progress": vars(progress)}, unfinished)
    unfinished.replace(path)


def restore(path: Path, parts: dict[str, Any]) -> Progress:
    """Load what `save` wrote, if there is any."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return Progress(**state["progress"])


def batch(tokens: Tensor, task: Task, seed: int, step: int) -> Tensor:
    """Return int64 windows (batch, length + 1) at places that depend on the seed and step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - task.length, (task.batch, 1), generator=generator)
    return tokens[starts + torch.arange(task.length + 1)].long()


def windows(tokens: Tensor, length: int, most: int) -> Tensor:
    """Return up to `most` windows (windows, length + 1), evenly spread, of disjoint targets."""
    found = tokens.unfold(0, length + 1, length)
    places = torch.linspace(0, len(found) - 1, min(most, len(found))).long()
    return found[places].long()


def mean_loss(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tokens after the first, nats a token, in float32."""
    logits: Tensor = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, held: Tensor, task: Task) -> float:
    """Return the mean loss over all tokens of the windows, whatever the batch size."""
    model.eval()
    with torch.autocast(held.device.type, torch.bfloat16, enabled=task.mixed):
        losses = [mean_loss(model, part).item() * len(part) for part in held.split(task.batch)]
    model.train()
    return math.fsum(losses) / len(held)
