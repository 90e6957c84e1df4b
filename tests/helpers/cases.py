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
    RACS,
    RMNPW,
    SGDM,
    ApolloAdamW,
    AutoRank,
    Blocks,
    CompensatedAdamW,
    CondaW,
    DCTAdamW,
    ErrorFeedback,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LDAdamW,
    Lion,
    LowRank,
    LowRankAdamW,
    MuonW,
    NormScaled,
    NorMuonW,
    Power,
    StateFree,
    TrionW,
)
from lowrank_optim.methods.registry import METHODS

GAP = 4
RANK = 3
AUTO = AutoRank(share=0.7, least=0.2, most=0.9)
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
PRESETS = [method.optimizer for method in METHODS.values()]
"""The methods that have a class of their own."""
FULL = [method.optimizer for method in METHODS.values() if method.whole or method.name == "trion"]
"""Those that are not AdamW where the rank drops nothing."""
PROJECTED = ("tall", "wide", "square", "stack", "conv")


@dataclass(frozen=True)
class Case:
    """A row of the table.

    `whole` says that the method works on whole matrices and takes neither rank nor interval;
    `carries` that what it carries is rounded when it is stored.
    """

    name: str
    factory: Callable[..., LowRank]
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    carries: bool = False

    def build(self, params: Any, **changes: Any) -> LowRank:
        """Return the optimizer; (name, tensor) pairs are one group, or they would be sorted."""
        params = list(params)
        if isinstance(params[0], tuple):
            params = [{"params": params}]
        size = {} if self.whole else {"rank": RANK, "update_proj_gap": GAP}
        return self.factory(params, **{"lr": 1e-2, **size, **self.settings, **changes})

    @property
    def chooses(self) -> bool:
        """Whether ranks follow from the gradient."""
        return self.settings.get("rank") is AUTO

    @property
    def coarse(self) -> bool:
        """Whether moments are rounded when they are stored."""
        return "state_dtype" in self.settings or self.carries

    @property
    def measured(self) -> bool:
        """Whether updates have another length than the published one."""
        (group,) = self.build([nn.Parameter(torch.ones(9, 5))]).param_groups
        return group["length"] != "published"

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
    Case("dct-8bit", DCTAdamW, {"update_proj_gap": 1, "state_dtype": "8bit"}),
    Case("fira", FiraAdamW),
    Case("fira-dct", FiraAdamW, {"projector": "dct", "on_refresh": "rotate"}),
    Case("frugal", FrugalAdamW),
    Case("frugal-svd-sgd", FrugalAdamW, {"projector": "svd", "state_free": "sgd"}),
    Case("frugal-blocks", FrugalAdamW, {"projector": Blocks("mirror"), "rank": 0.4}),
    Case("apollo", ApolloAdamW),
    Case("apollo-rotate", ApolloAdamW, {"on_refresh": "rotate"}),
    Case("apollo-mini", ApolloAdamW, {"rank": 1, "scale": 2.0}),
    Case("lowrank", LowRankAdamW, {"length": "published"}),
    Case("lion", LowRank, {"rule": "lion", "betas": (0.9, 0.99), "lr": 1e-3}),
    Case("lion-state-free", LowRank, {"rule": Lion(), "residual": StateFree(), "lr": 1e-3}),
    Case("sgdm-paper-fira", LowRank, {"rule": SGDM(), "residual": NormScaled(form="paper")}),
    Case("maximize", FiraAdamW, {"maximize": True}),
    Case("error-feedback", GaLoreAdamW, {"feed": ErrorFeedback(dtype=None)}),
    Case("error-feedback-bf16", FiraAdamW, {"feed": "error_feedback"}, carries=True),
    Case("error-feedback-4bit", DCTAdamW, {"feed": ErrorFeedback(dtype="4bit")}, carries=True),
    Case("trion", TrionW, {"update_proj_gap": 1}),
    Case("trion-8bit", TrionW, {"momentum_dtype": "8bit"}, carries=True),
    Case("muon", MuonW, whole=True),
    Case("muon-8bit", MuonW, {"state_dtype": "8bit"}, whole=True),
    Case("muon-power", LowRank, {"rule": "muon", "projector": "power", "on_refresh": "rotate"}),
    Case("normuon", NorMuonW, {"length": "published"}, whole=True),
    Case("rmnp", RMNPW, whole=True),
    Case("conda", CondaW, {"rank": 1.0}),
    Case("conda-low", CondaW),
    Case("ldadam", LDAdamW, {"update_proj_gap": 1, "error_dtype": None}),
    Case("compensated", CompensatedAdamW),
    Case("racs", RACS, whole=True),
    Case("auto-rank", GaLoreAdamW, {"rank": AUTO, "min_dim": 1, "on_refresh": "rotate"}),
    Case("auto-rank-dct", FiraAdamW, {"rank": AUTO, "min_dim": 1, "projector": "dct"}),
    Case("galore-length", GaLoreAdamW, {"length": "adamw"}),
    Case("lowrank-length", LowRankAdamW, {"length": "adamw"}),
    Case("frugal-length", FrugalAdamW, {"length": "adamw"}),
    Case("fira-rms", FiraAdamW, {"length": "rms"}),
    Case("apollo-mini-length", ApolloAdamW, {"rank": 1, "length": "adamw"}),
    Case("ldadam-length", LDAdamW, {"update_proj_gap": 1, "length": "adamw"}, carries=True),
    Case("normuon-length", NorMuonW, {"length": "adamw"}, whole=True),
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
