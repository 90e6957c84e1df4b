"""The methods of the demo, each with its paper's settings and its own two learning rates."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..methods.record import Method
from ..methods.registry import shown_first

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.1
PAPERS_GAP = 200


@dataclass(frozen=True)
class Recipe:
    """One method as the demo runs it.

    Args:
        method: its record.
        lr: peak learning rate of the projected matrices (AdamW's too: the same matrices).
        rest_lr: peak learning rate of embeddings, head and norms.
        betas: of the projected matrices; all other parameters have `BETAS`.
        length: of their updates.
        settings: further settings of the optimizer; none by default, since those are the paper's.
    """

    method: Method
    lr: float
    rest_lr: float
    betas: tuple[float, float] = BETAS
    length: str = "published"
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in `--methods`."""
        return self.method.name

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        return self.method.label


RECIPES = {
    name: Recipe(
        method,
        method.rates.lr,
        method.rates.rest_lr,
        method.rates.betas,
        method.rates.length,
    )
    for name, method in shown_first("in_demo").items()
    if method.rates is not None
}


def choose(names: Sequence[str]) -> list[Recipe]:
    """Return recipes by name, in the order given; ["all"] stands for all of them.

    Raises:
        ValueError: no name is given, or one is unknown or given twice.
    """
    known = ", ".join(RECIPES)
    if not names:
        raise ValueError(f"no method given; choose among {known}")
    if list(names) == ["all"]:
        return list(RECIPES.values())
    for place, name in enumerate(names):
        if name not in RECIPES:
            near = difflib.get_close_matches(name.lower(), RECIPES, n=1)
            hint = f"; did you mean {near[0]}? Else" if near else ";"
            raise ValueError(f"unknown method '{name}'{hint} choose among {known}")
        if name in names[:place]:
            raise ValueError(f"method '{name}' is given twice")
    return [RECIPES[name] for name in names]


def build_optimizer(
    recipe: Recipe, model: nn.Module, *, rank: int | float, steps: int, seed: int
) -> torch.optim.Optimizer:
    """Make the recipe's optimizer over the model, with one split of parameters for all methods.

    Args:
        rank: of the subspaces: a number of columns, or a share of the shorter axis in (0, 1].
        steps: length of the run; subspaces are refreshed a third of it apart, or PAPERS_GAP
            steps if that is less.
        seed: of the random projectors.
    """
    method = recipe.method
    groups = method.groups(
        model,
        rank,
        lr=recipe.lr,
        rest_lr=recipe.rest_lr,
        weight_decay=WEIGHT_DECAY,
        betas=recipe.betas,
        min_dim=1,
    )
    if method.optimizer is None:
        plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        return torch.optim.AdamW(plain, lr=recipe.lr, betas=BETAS)
    settings: dict[str, Any] = {"length": recipe.length, **recipe.settings}
    if method.default_gap is not None and not method.own_gap:
        settings["update_proj_gap"] = max(1, min(PAPERS_GAP, steps // 3))
    return method.optimizer(
        groups, lr=recipe.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, seed=seed, **settings
    )
