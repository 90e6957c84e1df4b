"""The one table of methods that every contract test runs over.

A case is a way to build an optimizer with settings that make things happen in few steps: a refresh
every `GAP` updates, and ranks strictly between 1 and the projected axes of `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim import (
    SGDM,
    ApolloAdamW,
    Blocks,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    Lion,
    LowRank,
    LowRankAdamW,
    NormScaled,
    Power,
    StateFree,
)

GAP = 4
RANK = 3
SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (13, 7),
    "wide": (5, 11),
    "square": (9, 9),
    "stack": (3, 8, 5),
    "conv": (6, 2, 3, 3),
    "narrow": (17, 2),
    "vector": (11,),
    "scalar": (),
    "empty": (0, 4),
}
PRESETS = [
    ApolloAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankAdamW,
]
"""The methods that have a class of their own."""
PROJECTED = ("tall", "wide", "square", "stack", "conv")


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    factory: Callable[..., LowRank]
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, params: Any, **changes: Any) -> LowRank:
        settings = {"lr": 1e-2, "rank": RANK, "update_proj_gap": GAP, **self.settings, **changes}
        return self.factory(params, **settings)

    @property
    def coarse(self) -> bool:
        """Whether moments are rounded when they are stored."""
        return "state_dtype" in self.settings

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("galore", GaLoreAdamW),
    Case("galore-rotate", GaLoreAdamW, {"on_refresh": "rotate"}),
    Case("galore-align", GaLoreAdamW, {"on_refresh": "align"}),
    Case("galore-power", GaLoreAdamW, {"projector": "power"}),
    Case("galore-power-rotate", GaLoreAdamW, {"projector": Power(1), "on_refresh": "rotate"}),
    Case("galore-reverse", GaLoreAdamW, {"side": "reverse", "rank": 2}),
    Case("galore-bf16-state", GaLoreAdamW, {"state_dtype": torch.bfloat16}),
    Case("galore-8bit", GaLoreAdamW, {"state_dtype": "8bit", "projector": "power"}),
    Case("fira-8bit", FiraAdamW, {"state_dtype": "8bit", "projector": "dct"}),
    Case("galore-rounding", GaLoreAdamW, {"stochastic_rounding": True}),
    Case("dct", DCTAdamW, {"update_proj_gap": 1}),
    Case("dct-gap", DCTAdamW, {}),
    Case("fira", FiraAdamW),
    Case("fira-dct", FiraAdamW, {"projector": "dct", "on_refresh": "rotate"}),
    Case("frugal", FrugalAdamW),
    Case("frugal-svd-sgd", FrugalAdamW, {"projector": "svd", "state_free": "sgd"}),
    Case("frugal-blocks", FrugalAdamW, {"projector": Blocks("mirror"), "rank": 0.4}),
    Case("apollo", ApolloAdamW),
    Case("apollo-rotate", ApolloAdamW, {"on_refresh": "rotate"}),
    Case("apollo-mini", ApolloAdamW, {"rank": 1, "scale": 2.0}),
    Case("lowrank", LowRankAdamW),
    Case("lion", LowRank, {"rule": "lion", "betas": (0.9, 0.99), "lr": 1e-3}),
    Case("lion-state-free", LowRank, {"rule": Lion(), "residual": StateFree(), "lr": 1e-3}),
    Case("sgdm-paper-fira", LowRank, {"rule": SGDM(), "residual": NormScaled(form="paper")}),
    Case("maximize", FiraAdamW, {"maximize": True}),
]


class Model(nn.Module):
    """One parameter of each shape; the loss has a gradient for all of them."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=rng, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))


def gradient(param: Tensor, step: int, position: int) -> Tensor:
    """Return the gradient of a step: a function of the step and the parameter's position alone."""
    rng = torch.Generator().manual_seed(1000 * step + position)
    return torch.randn(param.shape, generator=rng, dtype=torch.float64).to(param.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Run some steps with the gradients of `gradient`."""
    for step in steps:
        for position, param in enumerate(model.parameters()):
            param.grad = gradient(param, step, position)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Assert equality to the bit, by name."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
