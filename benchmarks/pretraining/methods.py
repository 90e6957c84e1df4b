"""The methods under comparison: each with its paper's settings, and where its rates are sought."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

import lowrank_optim


class Spec(NamedTuple):
    """One run, by everything that it depends on; what is equal is never run twice.

    Attributes:
        split: "tune" or "final", the held-out texts that it is judged by.
        lr, rest_lr: peak rates of the matrices, and of embeddings, head and norms.
        gap: steps between refreshes.
        state: dtype of the moments, "float32", "bfloat16" or "8bit".
        weights: dtype of weights and gradients; bfloat16 is rounded stochastically, AdamW's not.
        change: settings that differ from the method's, as keyword=value, ...
    """

    task: str
    method: str
    split: str
    seed: int
    steps: int
    lr: float
    rest_lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    rank: float = 0.25
    gap: int = 50
    weight_decay: float = 0.0
    state: str = "float32"
    weights: str = "float32"
    change: str = ""


@dataclass(frozen=True)
class Method:
    """A method as it is run.

    Args:
        optimizer: a class of lowrank_optim, or "AdamW" for torch.optim.AdamW.
        start: rates (lr, rest_lr) that the search starts from.
        settings: what the optimizer is built with besides.
        gap: steps between refreshes; None for an eighth of a run, and 200 at most.
        whole: whether it takes whole matrices, and has no subspace to move.
    """

    name: str
    label: str
    optimizer: str
    start: tuple[float, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    gap: int | None = None
    whole: bool = False

    @property
    def rank(self) -> float:
        """The share of the projected axis."""
        return 1.0 if self.whole else 0.25

    def gap_of(self, steps: int) -> int:
        """Return the steps between refreshes in a run of some length."""
        return self.gap or max(1, min(200, steps // 8))


POWER = {"projector": "power"}
METHODS = {
    method.name: method
    for method in (
        Method("adamw", "AdamW", "AdamW", (1e-3, 1e-2), gap=1),
        Method("galore", "GaLore", "GaLoreAdamW", (1e-2, 1e-2), POWER),
        Method("dct", "DCT", "DCTAdamW", (3e-3, 1e-2), gap=1),
        Method("fira", "Fira", "FiraAdamW", (5.5e-3, 1e-2), POWER),
        Method("frugal", "FRUGAL", "FrugalAdamW", (1e-3, 1e-2)),
        Method("apollo", "APOLLO", "ApolloAdamW", (3e-3, 1e-2)),
        Method("lowrank", "LowRankAdamW", "LowRankAdamW", (1.7e-3, 1e-2), gap=50),
        Method("muon", "Muon", "MuonW", (3e-2, 3e-2), gap=1, whole=True),
    )
}


def build_optimizer(spec: Spec, model: nn.Module) -> torch.optim.Optimizer:
    """Make a run's optimizer, with one split of parameters for all methods."""
    method = METHODS[spec.method]
    groups = lowrank_optim.param_groups(
        model,
        rank=spec.rank,
        lr=spec.lr,
        rest_lr=spec.rest_lr,
        weight_decay=spec.weight_decay,
        min_dim=1,
    )
    betas = (spec.beta1, spec.beta2)
    if method.optimizer == "AdamW":
        plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        return torch.optim.AdamW(plain, lr=spec.lr, betas=betas, fused=True)
    settings: dict[str, Any] = {
        **({} if method.whole else {"update_proj_gap": spec.gap}),
        "stochastic_rounding": spec.weights == "bfloat16",
        "state_dtype": {"float32": None, "bfloat16": torch.bfloat16}.get(spec.state, spec.state),
        **method.settings,
        **changes(spec.change),
    }
    make = getattr(lowrank_optim, method.optimizer)
    optimizer: torch.optim.Optimizer = make(
        groups,
        lr=spec.lr,
        betas=betas,
        weight_decay=spec.weight_decay,
        seed=spec.seed,
        **settings,
    )
    return optimizer


def changes(text: str) -> dict[str, Any]:
    """Read `on_refresh="rotate", state_free_scale=0.25` as keywords."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
