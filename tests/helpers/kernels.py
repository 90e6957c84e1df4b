"""What kernels are given: drawn tensors, a small model; and how whole steps are compared."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn


def draw(shape, dtype, device, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=rng, dtype=torch.float32)).to(dtype).to(device)


def matrices(count, rows, cols, dtype, device, layout, seed=0, batch=()):
    """Some (rows, cols) matrices or stacks: as they come, transposed, or every second entry."""
    found = []
    for k in range(count):
        if layout == "transposed":
            found.append(draw((*batch, cols, rows), dtype, device, seed + k).mT)
        elif layout == "strided":
            whole = draw((*batch, 2 * rows, 2 * cols), dtype, device, seed + k)
            found.append(whole[..., ::2, ::2])
        else:
            found.append(draw((*batch, rows, cols), dtype, device, seed + k))
    return found


def bases(count, cols, rank, dtype, device, seed=50):
    return [
        torch.linalg.qr(draw((cols, rank), torch.float32, "cpu", seed + k)).Q.to(dtype).to(device)
        for k in range(count)
    ]


def columns(count, cols, rank, device):
    rng = torch.Generator().manual_seed(3)
    return [
        torch.randperm(cols, generator=rng)[:rank].sort().values.to(device) for _ in range(count)
    ]


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
        "large": (4, 1030),
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


def assert_alike(left, right, start, worst, mean):
    """Differences relative to the way that the weights have gone."""
    for name, weights in left.named_parameters():
        param, other = weights.detach(), getattr(right, name).detach()
        origin = getattr(start, name).detach().to(param.device)
        way = (other.double() - origin.double()).abs().mean()
        apart = (param.double() - other.double()).abs()
        assert way > 0, name
        assert float(apart.max() / way) <= worst, (name, float(apart.max() / way))
        assert float(apart.mean() / way) <= mean, (name, float(apart.mean() / way))
