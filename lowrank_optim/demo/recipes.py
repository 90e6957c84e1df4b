"""The methods of the demo, each with its paper's settings and its own two learning rates."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import methods
from ..groups import param_groups

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.1
PAPERS_GAP = 200


@dataclass(frozen=True)
class Recipe:
    """One method as the demo runs it.

    Args:
        name: what `--methods` calls it.
        label: what tables and figures call it.
        optimizer: a class of lowrank_optim, or "AdamW" for torch.optim.AdamW.
        lr: peak learning rate of the projected matrices (AdamW's too: the same matrices).
        rest_lr: peak learning rate of embeddings, head and norms.
        settings: what the optimizer is built with besides.
        betas: of the projected matrices; all other parameters have `BETAS`.
        own_gap: refresh as often as the method does by itself, not three times a run.
        whole: works on whole matrices, whatever the rank.
    """

    name: str
    label: str
    optimizer: str
    lr: float
    rest_lr: float
    settings: Mapping[str, object] = field(default_factory=dict)
    betas: tuple[float, float] = BETAS
    own_gap: bool = False
    whole: bool = False


# Rates: the best of twelve runs a method in benchmarks/results/tune_demo.csv, by
# benchmarks/tune_demo.py, with another seed and without the texts that the demo validates on.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("adamw", "AdamW", "AdamW", 1e-3, 1e-2),
        Recipe(
            "galore", "GaLore", "GaLoreAdamW", 1.7e-2, 3e-2, {"scale": 0.25, "projector": "svd"}
        ),
        Recipe("dct", "DCT", "DCTAdamW", 3e-3, 1.7e-2, {"scale": 1.0}, own_gap=True),
        Recipe("fira", "Fira", "FiraAdamW", 5.5e-3, 1e-1, {"scale": 0.25, "projector": "svd"}),
        Recipe("frugal", "FRUGAL", "FrugalAdamW", 1e-3, 1e-2, {"state_free": "sign"}),
        Recipe("apollo", "APOLLO", "ApolloAdamW", 3e-3, 1e-1, {"scale": 1.0}),
        Recipe("lowrank", "LowRank", "LowRankAdamW", 3e-3, 5.5e-2, own_gap=True),
        Recipe("ldadam", "LDAdam", "LDAdamW", 1e-2, 1e-1, betas=(0.908, 0.99), own_gap=True),
        Recipe("trion", "Trion", "TrionW", 5.5e-2, 1e-1, own_gap=True),
        Recipe("compensated", "Compens.", "CompensatedAdamW", 1.7e-2, 3e-2, betas=(0.9, 0.9)),
        Recipe("conda", "Conda", "CondaW", 1e-2, 1e-1, betas=(0.9, 0.99), whole=True),
        Recipe("muon", "Muon", "MuonW", 5.5e-2, 1e-1, own_gap=True, whole=True),
        Recipe(
            "normuon",
            "NorMuon",
            "NorMuonW",
            1e-2,
            3e-1,
            betas=(0.9, 0.95),
            own_gap=True,
            whole=True,
        ),
        Recipe("racs", "RACS", "RACS", 3e-2, 5.5e-3, own_gap=True, whole=True),
    )
}


def choose(names: Sequence[str]) -> list[Recipe]:
    """Look recipes up by name, in the order given; the name all stands for all of them.

    Raises:
        ValueError: a name is unknown, given twice, or there is none.
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
    groups = param_groups(
        model,
        rank=1.0 if recipe.whole else rank,
        lr=recipe.lr,
        rest_lr=recipe.rest_lr,
        weight_decay=WEIGHT_DECAY,
        betas=recipe.betas,
        min_dim=1,
    )
    if recipe.optimizer == "AdamW":
        plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        return torch.optim.AdamW(plain, lr=recipe.lr, betas=BETAS)
    settings = dict(recipe.settings)
    if not recipe.own_gap:
        settings["update_proj_gap"] = max(1, min(PAPERS_GAP, steps // 3))
    make = getattr(methods, recipe.optimizer)
    optimizer: torch.optim.Optimizer = make(
        groups, lr=recipe.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, seed=seed, **settings
    )
    return optimizer
