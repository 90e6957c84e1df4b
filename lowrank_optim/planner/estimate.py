"""What training a model takes on a card, by method."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..methods.registry import shown_first
from .cards import Card, card_of
from .models import PlanError, build, foreign, full_name, token_loss, without_values
from .needs import needs_of
from .phases import Parts, phases_of, weight_bytes
from .search import Traces, largest, widest
from .trace import Loss

METHODS = shown_first("in_planner")
"""The columns of the table."""


@dataclass(frozen=True)
class Estimate:
    """What one method takes.

    Attributes:
        name: its key in `METHODS`.
        label: its name in tables.
        layerwise: whether parameters are updated inside the backward pass.
        phases: bytes at the moment when the most are alive, in the forward and backward pass
            ("backward") and in the optimizer's step ("step").
        state_bytes: `state_bytes` of the optimizer after its first step, bases among them.
        shared_bytes: bases that layers share, which are no part of the state.
        spare: bytes of the card that are left, negative if it is too small; None without a card.
        largest_rank: the largest rank that fits, with this batch; None without a card, for methods
            without a rank, and where none fits.
        largest_batch: the largest batch that fits, at this rank; None likewise.
    """

    name: str
    label: str
    layerwise: bool
    phases: dict[str, Parts]
    state_bytes: int
    shared_bytes: int
    spare: int | None = None
    largest_rank: int | None = None
    largest_batch: int | None = None

    @property
    def peak(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def parts(self) -> Parts:
        """What lives at the peak."""
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.parts.total

    @property
    def fits(self) -> bool | None:
        """Whether the card is large enough; None without a card."""
        return None if self.spare is None else self.spare >= 0


@dataclass(frozen=True)
class Plans:
    """All methods under the same conditions.

    Attributes:
        model: what it was called, or its class.
        parameters: number of values, frozen ones too.
        settings: what `estimate_memory` was given.
        card: the card, if one was given.
        rows: one estimate for each method.
    """

    model: str
    parameters: int
    settings: dict[str, Any]
    card: Card | None
    rows: list[Estimate] = field(default_factory=list)

    def __getitem__(self, name: str) -> Estimate:
        """Return the estimate of a method."""
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON knows, sizes in bytes."""
        rows = []
        for row in self.rows:
            phases = {name: {**asdict(p), "total": p.total} for name, p in row.phases.items()}
            derived = {"peak": row.peak, "total": row.total, "fits": row.fits}
            rows.append({**asdict(row), "phases": phases, **derived})
        card = self.card and {**self.card._asdict(), "usable": self.card.usable}
        described = {"model": self.model, "parameters": self.parameters, **self.settings}
        return {**described, "gpu": card, "methods": rows}


def estimate_memory(
    model: nn.Module | str,
    *,
    optimizer: str | Sequence[str] | None = None,
    rank: int | float = 0.25,
    state_dtype: torch.dtype | str | None = None,
    layerwise: bool = False,
    batch: int = 1,
    seq: int = 2048,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    gpu: str | int | None = None,
    loss: Loss | None = None,
) -> Plans:
    """Return what training a model takes, without running it and without its weights.

    total = max over phases of (weights + gradients + state + bases + workspace + activations).
    In the forward and backward pass, activations live and gradients are made. In the step, all
    gradients and the workspace live, and no activations. With `layerwise`, each gradient is used
    and freed as soon as it is complete. The state comes from the real optimizer and the activations
    from the real model, both on the "meta" device; see `trace` and `needs` for what is assumed.

    Args:
        model: a module, of which a copy without values is planned, or a name as in `build`.
        optimizer: names of `METHODS`, or "all"; None for the ones most asked for.
        rank: an int, or a float in (0, 1], a share of the projected axis.
        state_dtype: as in `LowRank`, for our methods.
        layerwise: with `step_in_backward()`, for the methods that have it.
        batch, seq: sequences a step, and tokens in each.
        checkpointing: recompute each layer's activations in the backward pass.
        dtype: of the weights of a model given by name.
        gpu: a card or its memory as text ("RTX 4090", "24GiB"), or bytes.
        loss: function (model, batch, seq) that runs a model and returns its loss; a language
            model's by default.

    Raises:
        ValueError: something is unknown, or the model cannot be run without values.
        ImportError: transformers is needed and missing.
    """
    for key, value in (("batch", batch), ("seq", seq)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{key}={value!r}: {key} must be an int of at least 1")
    names = chosen(optimizer)
    card = Card(f"{gpu} bytes", gpu) if isinstance(gpu, int) else card_of(gpu) if gpu else None
    if isinstance(model, str):
        title = full_name(model)
        planned, own_loss = build(model, dtype)
    else:
        title, planned, own_loss = type(model).__name__, without_values(model).train(), token_loss
    if not any(param.requires_grad for param in planned.parameters()):
        raise PlanError(f"no parameter of {type(planned).__name__} is trainable")
    if checkpointing:
        enable_checkpointing(planned)
    traces = Traces(planned, loss or own_loss, batch, seq)
    weights = weight_bytes(planned)
    settings = {
        "dtype": str(next(planned.parameters()).dtype).removeprefix("torch."),
        "rank": rank,
        "state_dtype": None if state_dtype is None else str(state_dtype).removeprefix("torch."),
        "layerwise": layerwise,
        "batch": batch,
        "seq": seq,
        "checkpointing": checkpointing,
    }
    plans = Plans(title, sum(p.numel() for p in planned.parameters()), settings, card)
    for name in names:
        method = METHODS[name]
        needs = needs_of(method, planned, rank, state_dtype)
        phases = phases_of(traces.at(batch), needs, weights, layerwise)
        spare = most = wide = None
        if card is not None:
            room = card.usable
            spare = room - max(parts.total for parts in phases.values())
            most = largest(traces, needs, weights, layerwise, room)
            wide = widest(method, planned, state_dtype, traces.at(batch), weights, layerwise, room)
        plans.rows.append(
            Estimate(
                name=name,
                label=method.label,
                layerwise=layerwise and needs.alone is not None,
                phases=phases,
                state_bytes=needs.state,
                shared_bytes=needs.shared,
                spare=spare,
                largest_rank=wide,
                largest_batch=most,
            )
        )
    return plans


def chosen(optimizer: str | Sequence[str] | None) -> list[str]:
    """Return the names of methods asked for, in order."""
    if optimizer is None:
        return [name for name, method in METHODS.items() if method.in_planner]
    if optimizer in ("all", ["all"]):
        return list(METHODS)
    names = [optimizer] if isinstance(optimizer, str) else list(optimizer)
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(str(name).lower(), METHODS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise PlanError(f"unknown method '{name}': {hint}known are {', '.join(METHODS)}")
    if not names or len(set(names)) < len(names):
        raise PlanError(f"methods must be named, each once; known are {', '.join(METHODS)}")
    return names


def enable_checkpointing(model: nn.Module) -> None:
    """Turn on activation checkpointing in the way of transformers' models."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if callable(enable := getattr(model, name, None)):
            with foreign(f"{type(model).__name__} cannot checkpoint"):
                enable()
            return
    raise PlanError(
        f"{type(model).__name__} has no gradient_checkpointing_enable(): make the factory return a "
        "model that checkpoints, and leave checkpointing out"
    )
