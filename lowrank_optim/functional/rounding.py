"""Randomness as a function of numbers, and rounding that uses it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Return a generator that is a function of some non-negative numbers and of nothing else."""
    seed = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(seed) >> 1)


def stochastic_round(x: Tensor, rng: torch.Generator) -> Tensor:
    """Round to bfloat16 up or down at random, so that the expectation is the (float32) value.

    Sixteen random bits are added below the bits that stay, and the rest is cut off. Values that are
    not finite are rounded as usual.
    """
    x = x.to(torch.float32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=rng)
    bits = noise.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def round_into_(target: Tensor, value: Tensor, rng: torch.Generator | None) -> None:
    """Write `value` into `target`, rounding stochastically with `rng`; nothing if they are one."""
    if rng is not None:
        target.copy_(stochastic_round(value, rng))
    elif target is not value:
        target.copy_(value)
