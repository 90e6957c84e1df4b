"""How moments lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import compute_dtype

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

    def store(self, stored: Tensor, value: Tensor) -> None:
        """Write a changed moment back, rounding to the stored dtype."""
        if stored is not value:
            stored.copy_(value)
