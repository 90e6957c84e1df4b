"""The methods under comparison: each with its paper's settings, and where its rates are sought."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

import lowrank_optim
from lowrank_optim.methods.record import Method as Record
from lowrank_optim.methods.registry import COMPARED


class Spec(NamedTuple):
    """One run, by everything that it depends on; what is equal is never run twice.

    Attributes:
        split: "tune" or "final", the held-out texts that it is judged by.
        lr, rest_lr: peak rates of the matrices, and of embeddings, head and norms.
        gap: steps between refreshes.
        state: dtype of the moments, "float32", "bfloat16" or "8bit".
        weights: dtype of weights and gradients; bfloat16 is rounded stochastically, AdamW's not.
        change: settings that differ from the method's, as keyword=value, ...; the length of an
            update is the published one where none is named.
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
        record: what it is.
        start: rates (lr, rest_lr) that the search starts from.
        label: what tables call it, if not as elsewhere.
    """

    record: Record
    start: tuple[float, float]
    label: str

    @property
    def rank(self) -> float:
        """The share of the projected axis."""
        return 1.0 if self.record.whole else 0.25

    def gap_of(self, steps: int) -> int:
        """Return the steps between refreshes in a run of some length.

        Its own, if that belongs to the method; 1 where there is none; else an eighth of a run, and
        200 at most.
        """
        if self.record.own_gap or self.record.default_gap is None:
            return self.record.default_gap or 1
        return max(1, min(200, steps // 8))


STARTS = {
    "adamw": (1e-3, 1e-2),
    "galore": (1e-2, 1e-2),
    "dct": (3e-3, 1e-2),
    "fira": (5.5e-3, 1e-2),
    "frugal": (1e-3, 1e-2),
    "apollo": (3e-3, 1e-2),
    "lowrank": (1.7e-3, 1e-2),
    "muon": (3e-2, 3e-2),
    "normuon": (1e-2, 3e-2),
    "ldadam": (1e-2, 3e-2),
    "trion": (5.5e-2, 3e-2),
    "compensated": (1.7e-2, 3e-2),
    "conda": (1e-2, 3e-2),
    "rmnp": (3e-2, 3e-2),
    "racs": (3e-2, 1e-2),
}
OWN_LABELS = {"lowrank": "LowRankAdamW"}
METHODS = {
    name: Method(known, start, OWN_LABELS.get(name, known.label))
    for name, start in STARTS.items()
    for known in [COMPARED[name]]
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
    if method.record.optimizer is None:
        plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        return torch.optim.AdamW(plain, lr=spec.lr, betas=betas, fused=True)
    settings: dict[str, Any] = {
        **({} if method.record.whole else {"update_proj_gap": spec.gap}),
        "stochastic_rounding": spec.weights == "bfloat16",
        "state_dtype": {"float32": None, "bfloat16": torch.bfloat16}.get(spec.state, spec.state),
        "length": "published",
        **changes(spec.change),
    }
    return method.record.build(
        groups,
        lr=spec.lr,
        betas=betas,
        weight_decay=spec.weight_decay,
        seed=spec.seed,
        **settings,
    )


def changes(text: str) -> dict[str, Any]:
    """Read `on_refresh="rotate", state_free_scale=0.25` as keywords."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
