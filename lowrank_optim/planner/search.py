"""The largest batch and the largest rank that fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import nn

from ..groups import param_groups
from ..methods.record import Method
from ..parts.rank import subspace_of
from .models import PlanError, foreign
from .needs import Needs, needs_of
from .phases import phases_of
from .trace import Loss, Trace, trace

MOST = 1 << 20
"""Sequences a batch at which the search ends."""

BEYOND = 2.0**61
"""Bytes that no card has, and that add up without an overflow."""

PROBES = 6
"""Tries along the line before the interval is halved."""

STEP = 8
"""Ranks above it are multiples of it: they suit the units that multiply matrices."""


class Traces:
    """Forward and backward passes of a model with any batch.

    What lives after each operator is linear in the batch, so two passes determine it. A batch of
    one is not used for this: it makes a few copies less.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: int, seq: int) -> None:
        self.model, self._loss, self._seq = model, loss, seq
        self._asked = batch, self._run(batch)

    def _run(self, batch: int) -> Trace:
        with foreign(
            f"{type(self.model).__name__} cannot be run without values, on a batch of "
            f"{batch} x {self._seq} (a loss of your own may do what it needs: see estimate_memory)"
        ):
            found = trace(self.model, self._loss, batch, self._seq)
        if not found.steps:
            raise PlanError(f"no parameter of {type(self.model).__name__} gets a gradient")
        return found

    @cached_property
    def _pair(self) -> tuple[int, Trace, Trace]:
        """Two passes, with neighbouring batches, and the smaller of these."""
        batch, asked = self._asked
        first = asked if batch > 1 else self._run(2)
        start = max(2, batch)
        second = self._run(start + 1)
        if len(first.live) != len(second.live):
            raise PlanError(
                f"{type(self.model).__name__} runs other operators with another batch, so that no "
                "largest one can be found"
            )
        return start, first, second

    def at(self, batch: int) -> Trace:
        """Return the pass with a batch."""
        if batch == self._asked[0]:
            return self._asked[1]
        start, first, second = self._pair
        slope = (second.live - first.live).astype(np.float64)  # exact: a pass is below 2**53 bytes
        grown = np.minimum((batch - start) * slope, BEYOND).astype(np.int64)
        return Trace(np.maximum(first.live + grown, first.grads), first.grads, first.steps)


def largest(traces: Traces, needs: Needs, weights: int, layerwise: bool, room: int) -> int | None:
    """Return the largest batch whose total is at most `room` bytes; None if there is none."""

    def total(batch: int) -> int:
        phases = phases_of(traces.at(batch), needs, weights, layerwise)
        return max(parts.total for parts in phases.values())

    return last(total, room, MOST)


def widest(
    method: Method,
    model: nn.Module,
    state: torch.dtype | str | None,
    passed: Trace,
    weights: int,
    layerwise: bool,
    room: int,
) -> int | None:
    """Return the largest rank whose total is at most `room` bytes, from `STEP` on a multiple of it.

    None for a method without a rank, and if none fits. A matrix with no axis longer than the rank
    is not projected, as in training.
    """
    if method.optimizer is None or method.whole:
        return None

    def total(rank: int) -> int:
        phases = phases_of(passed, needs_of(method, model, rank, state), weights, layerwise)
        return max(parts.total for parts in phases.values())

    most = largest_rank(model)
    coarse = last(lambda count: total(STEP * count), room, most // STEP)
    return STEP * coarse if coarse else last(total, room, min(most, STEP - 1))


def largest_rank(model: nn.Module) -> int:
    """Return the largest rank at which a matrix of the model is still projected."""
    shapes = [tuple(param.shape) for param in param_groups(model, rank=1)[0]["params"]]
    spaces = [space for shape in shapes if (space := subspace_of(shape, 1, "auto"))]
    return max(cols for cols, _ in spaces) - 1


def last(total: Callable[[int], int], room: int, most: int) -> int | None:
    """Return the largest number from 1 to `most` whose total is at most `room`; None if none is.

    Totals grow almost linearly. The first tries are where the line through the ends of the interval
    meets `room`; if that does not end the search soon, the interval is halved.
    """
    if most < 1 or (low := total(1)) > room:
        return None
    if (high := total(most)) <= room:
        return most
    good, bad, probes = 1, most, 0
    while bad - good > 1:
        middle = (good + bad) // 2
        if probes < PROBES and high > low:
            met = good + (room - low) * (bad - good) // (high - low)
            middle = min(max(met, good + 1), bad - 1)
        probes += 1
        size = total(middle)
        if size <= room:
            good, low = middle, size
        else:
            bad, high = middle, size
    return good
