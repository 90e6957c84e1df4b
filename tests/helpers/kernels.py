"""What kernels are given: drawn tensors, a small model."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


def draw(shape, dtype, device, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=rng, dtype=torch.float32)).to(dtype).to(device)


class Small(nn.Module):
    """What kernels are given: tall, wide, a stack, a convolution, plain ones small and large."""

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "tall": (21, 9),
        "wide": (7, 18),
        "twin": (21, 9),
        "stack": (2, 8, 5),
        "conv": (6, 2, 3, 3),
        "vector": (11,),
        "large": (17, 260),
    }
    FEW: ClassVar[dict[str, tuple[int, ...]]] = {
        "tall": (11, 9),
        "wide": (7, 10),
        "stack": (2, 4, 5),
        "large": (17, 260),
    }
    """For moments in 8 bits, of which an interpreted kernel does a row at a time."""

    def __init__(self, dtype, few=False):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        for name, shape in (self.FEW if few else self.SHAPES).items():
            value = torch.randn(shape, generator=rng, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def groups(self, rank):
        plain = [param for name, param in self.named_parameters() if name in ("vector", "large")]
        matrices = [param for param in self.parameters() if all(param is not p for p in plain)]
        return [{"params": matrices, "rank": rank}, {"params": plain, "rank": None}]
