"""The bytes of each phase, from what lives over a backward pass and what an optimizer needs."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from torch import nn

from .needs import Needs
from .trace import Trace


@dataclass(frozen=True)
class Parts:
    """Bytes that live at one moment.

    Attributes:
        weights: parameters and buffers.
        gradients: complete gradients of parameters.
        state: moments and counts of the optimizer.
        basis: of its subspaces, stored or shared.
        workspace: what the optimizer's step makes and drops.
        activations: all else: what the backward pass needs, its own temporaries, the batch.
    """

    weights: int
    gradients: int
    state: int
    basis: int
    workspace: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(astuple(self))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def phases_of(trace: Trace, needs: Needs, weights: int, layerwise: bool) -> dict[str, Parts]:
    """Return what lives when the most does, in the forward and backward pass and in the step.

    With `layerwise`, one parameter is stepped at a time, beside the activations still needed.
    """
    basis = needs.bases + needs.shared
    alone = needs.alone if layerwise else None
    live = trace.live if alone is None else trace.live - trace.grads
    place = int(np.argmax(live))
    complete = 0 if alone is not None else int(trace.grads[place])
    backward = Parts(weights, complete, needs.moments, basis, 0, int(live[place]) - complete)
    if alone is None:
        gradients = sum(size for _, size, _ in trace.steps)
        step = Parts(weights, gradients, needs.moments, basis, needs.workspace, 0)
        return {"backward": backward, "step": step}
    moments = [
        Parts(
            weights, size, needs.moments, basis, alone[param],
            int(trace.live[place] - trace.grads[place]) - size,
        )
        for place, size, param in trace.steps
    ]  # fmt: skip
    return {"backward": backward, "step": max(moments, key=lambda parts: parts.total)}
