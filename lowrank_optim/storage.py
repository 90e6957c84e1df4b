"""How moments lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import compute_dtype, stochastic_round
from .plan import Draw

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Dense:
    """Moments as plain tensors.

    Args:
        name: "float32", "float64" or "bfloat16"; None takes the dtype of the arithmetic, float32
            for bf16, fp16 and fp32 parameters and float64 for float64.
    """

    name: str | None = None

    def dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype that the state of a parameter gets."""
        return compute_dtype(like.dtype) if self.name is None else DTYPES[self.name]

    def zeros(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return a zero moment of `shape` on the device of `like`."""
        return torch.zeros(shape, dtype=self.dtype(like), device=like.device)

    def load(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the moment in `dtype`: the stored tensor itself where it has it."""
        return stored.to(dtype)

    def store(self, stored: Tensor, value: Tensor, draw: Draw) -> None:
        """Write a changed moment back.

        bfloat16 is rounded stochastically: an average with a decay of 0.999 changes by less than
        half a unit in the last place of bfloat16 a step, and would never fall.
        """
        if stored is value:
            return
        bfloat16 = stored.dtype == torch.bfloat16
        stored.copy_(stochastic_round(value, draw()) if bfloat16 else value)
