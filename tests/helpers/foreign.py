"""Optimizers of galore-torch, fira and apollo-torch beside ours, for tests of `import_state`.

Theirs add eps to the uncorrected root and decay after the update: so eps is tiny here, and an
update is what is left of a step without its decay.
"""

from __future__ import annotations

import fira
import galore_torch
import pytest
import torch
from torch import nn

from lowrank_optim import ApolloAdamW, FiraAdamW, GaLoreAdamW, LowRank

DECAY, GAP, RANK = 0.1, 5, 3
SHAPES = {"tall": (13, 7), "wide": (5, 11), "square": (9, 9), "bias": (11,)}
PROJECTED = ("tall", "wide", "square")
PROJ_TYPES = {"std": "auto", "reverse_std": "reverse", "right": "right", "left": "left"}
NUMBERS = {"lr": 1e-2, "eps": 1e-12, "weight_decay": DECAY}


def apollo_class():
    module = pytest.importorskip("apollo_torch", reason="apollo-torch is needed to compare with it")
    return module.APOLLOAdamW


THEIRS = {
    "galore": (lambda: galore_torch.GaLoreAdamW, {"scale": 0.5}),
    "fira": (lambda: fira.FiraAdamW, {"alpha": 0.5}),
    "apollo": (apollo_class, {"scale": 2.0, "proj": "random", "scale_type": "channel"}),
    "apollo-svd": (apollo_class, {"scale": 2.0, "proj": "svd", "scale_type": "channel"}),
}
OURS = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "apollo": ApolloAdamW,
    "apollo-svd": lambda *args, **more: ApolloAdamW(*args, projector="svd", **more),
}

KEEP = {"apollo": ("scale",)}
"""Axes of several lengths have no common scale there: see the test of just that."""
each_exact = pytest.mark.parametrize("name", ["galore", "fira", "apollo-svd"])
each = pytest.mark.parametrize("name", THEIRS)


def weights(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def groups(params, **settings):
    """The plain group first, as in their README."""
    return [
        {"params": [params["bias"]]},
        {"params": [params[name] for name in PROJECTED], **settings},
    ]


def their_optimizer(name, params, *, rank=RANK, gap=GAP, proj_type="std", **numbers):
    cls, keys = THEIRS[name]
    settings = {"rank": rank, "update_proj_gap": gap, "proj_type": proj_type, **keys}
    return cls()(groups(params, **settings), no_deprecation_warning=True, **{**NUMBERS, **numbers})


def our_optimizer(name, params, *, rank=RANK, side="auto", **settings):
    """One that has nothing but its structure in common with theirs."""
    return OURS[name](groups(params, rank=rank), side=side, **{"stagger": False, **settings})


def step(params, optimizer, number):
    """Do one step with gradients of the number alone; return the updates without their decay."""
    before = {name: param.detach().clone() for name, param in params.items()}
    for place, param in enumerate(params.values()):
        rng = torch.Generator().manual_seed(100 * number + place)
        mean = torch.ones(param.shape, dtype=torch.float64).cumsum(0)
        noise = torch.randn(param.shape, generator=rng, dtype=torch.float64)
        param.grad = (0.2 * mean + noise).to(param.dtype)
    optimizer.step()
    kept = 1 - NUMBERS["lr"] * DECAY
    ours = isinstance(optimizer, LowRank)
    return {
        name: before[name] * kept - param.detach() if ours else before[name] - param.detach() / kept
        for name, param in params.items()
    }


def begun(name, steps, dtype=torch.float64, **settings):
    """Their optimizer after some steps, with its parameters."""
    params = weights(dtype)
    optimizer = their_optimizer(name, params, **settings)
    for number in range(steps):
        step(params, optimizer, number)
    return params, optimizer


def copies(params):
    return {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
