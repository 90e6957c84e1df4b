"""What optimizer checkpoints of galore-torch, fira and apollo-torch hold, and whether it fits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.views import is_wide
from ..parts.checks import SettingError, text_of
from ..parts.kinds import COUNT, NORM, NOT_NEGATIVE, NUMBER, UNIT
from ..parts.plan import Plan
from ..parts.projectors import Random
from ..parts.residuals import Drop, GradScaled, NormScaled
from ..parts.rules import Adam
from ..parts.types import Group, Site, State
from ..settings.keys import PROJ_TYPES
from .states import unkind, values_of


@dataclass(frozen=True)
class Package:
    """Another package's AdamW: how its groups are recognised, and what is peculiar to its state.

    Attributes:
        name: what pip calls it.
        mark: a key of its projected groups; the first package whose mark is found is taken.
        ours: the class that goes on with it.
        residual: what that class does with the rest of the gradient.
        norm: where it keeps the norm of its limiter, "" without one.
    """

    name: str
    mark: str
    ours: str
    residual: type
    norm: str = ""


FIRA = Package("fira", "alpha", "FiraAdamW", NormScaled, "scaling_grad")
APOLLO = Package("apollo-torch", "scale_type", "ApolloAdamW", GradScaled, "scaled_grad")
GALORE = Package("galore-torch", "proj_type", "GaLoreAdamW", Drop)
PACKAGES = (FIRA, APOLLO, GALORE)

PROJECTORS = (
    ("galore_torch.galore_projector", "GaLoreProjector"),
    ("fira.gradient_projection", "GradientProjector"),
    ("apollo_torch.random_projector", "GradientProjector"),
    ("apollo_torch.svd_projector", "GaLoreProjector"),
)
"""Modules and names of the classes whose objects stand in their states."""

ATTRIBUTES = ("rank", "proj_type", "ortho_matrix")
"""What is read of them."""

ONLY_THERE = ("proj_type", "alpha", "correct_bias", "proj", "scale_type")
"""Group keys of theirs that we do not have."""

KINDS = {"step": COUNT, "exp_avg": NUMBER, "exp_avg_sq": NOT_NEGATIVE}
"""What the state of every parameter has there."""


class Pair(NamedTuple):
    """A parameter here and its state there; `group` is ours with their numbers, `other` theirs."""

    name: str
    param: Tensor
    site: Site | None
    position: int
    group: Group
    plan: Plan
    theirs: State
    other: Group
    package: Package


def read(path: str | os.PathLike[str]) -> Any:
    """Return what a file holds; projectors become objects with their attributes and no code.

    Raises:
        SettingError: it is damaged, or holds something that could run code.
        OSError: it cannot be opened.
    """
    bare: list[Any] = [type(name, (), {"__module__": module}) for module, name in PROJECTORS]
    with open(path, "rb") as file, torch.serialization.safe_globals(bare):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file raises is anything
            raise SettingError(
                f"{os.fspath(path)!r} is no file of torch.save, is damaged, or holds more than "
                "tensors, plain values and the projectors of galore-torch, fira and apollo-torch: "
                "if you trust it, pass torch.load(path, weights_only=False)"
            ) from error


def state_dicts(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield the optimizer state dicts in nested dicts and lists."""
    if isinstance(tree, dict) and "state" in tree and "param_groups" in tree:
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from state_dicts(item)


def package_of(others: Sequence[Group]) -> Package:
    """Return the package whose checkpoints have such groups."""
    keys = {key for other in others for key in other}
    for package in PACKAGES:
        if package.mark in keys:
            return package
    raise SettingError(
        "no group of the checkpoint has a projection of galore-torch, fira or apollo-torch "
        "('proj_type'): one of this package is loaded with optimizer.load_state_dict"
    )


def is_random(other: Group) -> bool:
    """Return whether the subspaces of a group of theirs are random, not learnt."""
    return other.get("proj") == "random"


def check_entries(name: str, theirs: State, package: Package) -> None:
    """Raise SettingError for a state that is not of AdamW with dense moments."""
    known = (*KINDS, "projector", "seed", package.norm)
    if strange := [key for key in theirs if key not in known]:
        raise SettingError(
            f"the state of {name} has {', '.join(map(repr, strange))} in the checkpoint: 8-bit and "
            "Adafactor states cannot be imported, start without them"
        )
    if theirs and (missing := [key for key in KINDS if key not in theirs]):
        raise SettingError(f"the state of {name} has no {missing[0]!r} in the checkpoint")
    for key in (key for key in (*KINDS, package.norm) if key in theirs):
        alone, where = key in ("step", package.norm), f"{key!r} of {name}"
        value = values_of(where, theirs[key], alone)
        if (alone and value.ndim) or (not alone and not value.is_floating_point()):
            raise SettingError(f"{where} is a {value.dtype} of shape {tuple(value.shape)}")
        kind = KINDS.get(key, NORM)
        if not kind.allows(value, 0):
            raise unkind(where, kind)


def check_group(other: Group, package: Package, plan: Plan, where: str) -> None:
    """Raise SettingError if `plan` cannot go on with a group of theirs."""
    if not other.get("correct_bias", True):
        raise SettingError(
            f"correct_bias=False{where} of the checkpoint is not offered: set it to True there to "
            "go on with bias correction"
        )
    if not isinstance(plan.rule, Adam):
        raise SettingError(
            f"the checkpoint has Adam's moments, this optimizer has {text_of(plan.rule)}{where}: "
            f"build {package.ours}"
        )
    if plan.feed.slots:
        raise SettingError(
            f"the checkpoint carries only moments, this optimizer has {text_of(plan.feed)}"
            f"{where}: build {package.ours}"
        )
    if "rank" not in other:
        return
    if plan.length.sampled:
        raise SettingError(
            "the checkpoint has no sample of each matrix, which this optimizer keeps with "
            f'length="adamw"{where}: build {package.ours} with length="published"'
        )
    if not isinstance(plan.residual, package.residual):
        raise SettingError(
            f"the checkpoint is one of {package.name}, this optimizer has "
            f"{text_of(plan.residual)}{where}: build {package.ours}"
        )
    random = is_random(other)
    if not (isinstance(plan.projector, Random) if random else "basis" in plan.projector.keys):
        raise SettingError(
            f"the subspaces of the checkpoint{where} are {'random' if random else 'learnt'}, this "
            f"optimizer has {text_of(plan.projector)}: build it with "
            f'projector="{"random" if random else "svd"}"'
        )


def check_pair(pair: Pair) -> None:
    """Raise SettingError if a parameter was projected in another way than it is here."""
    name, site, projector = pair.name, pair.site, pair.theirs.get("projector")
    if projector is not None and not all(hasattr(projector, key) for key in ATTRIBUTES):
        raise SettingError(
            f"the projector of {name} is a {type(projector).__name__} in the checkpoint, without "
            f"{', '.join(ATTRIBUTES)}: remove its state there to start this parameter anew"
        )
    if site is None or projector is None:
        if site is not projector:
            there = "not projected" if projector is None else f"projected to rank {projector.rank}"
            here = "not projected" if site is None else f"projected to rank {site.rank}"
            raise SettingError(
                f"{name} was {there} in the checkpoint and is {here} here: build the optimizer "
                "with the checkpoint's groups and ranks"
            )
        return
    if projector.proj_type not in list(PROJ_TYPES):
        raise SettingError(
            f"{name} was projected with proj_type={projector.proj_type!r} in the checkpoint, which "
            "takes two bases and is not offered: start without its state"
        )
    if not isinstance(projector.ortho_matrix, Tensor):
        raise SettingError(
            f"the projector of {name} has no basis in the checkpoint: remove its state there to "
            "start this parameter anew"
        )
    basis = values_of(f"the basis of {name}", projector.ortho_matrix, False)
    if not is_random(pair.other) and not UNIT.allows(basis, 0):
        raise unkind(f"the basis of {name}", UNIT)
    side, shape = PROJ_TYPES[projector.proj_type], tuple(pair.param.shape)
    if is_wide(shape, side) != site.layout.wide:
        raise SettingError(
            f"{name} was projected with proj_type={projector.proj_type!r} in the checkpoint, and "
            f'has side={pair.plan.side!r} here: build the optimizer with side="{side}"'
        )
    if projector.rank != site.rank:
        raise SettingError(
            f"the ranks of {name} differ: rank {projector.rank} in the checkpoint, {site.rank} here"
        )
    residual = pair.plan.residual
    if isinstance(residual, GradScaled):
        whole = residual.per == "tensor" or (residual.per == "auto" and site.rank == 1)
        kind = pair.other.get("scale_type")
        if whole != (kind == "tensor"):
            raise SettingError(
                f"{name} was scaled with scale_type={kind!r} in the checkpoint: put "
                f'residual=GradScaled(per="{"tensor" if kind == "tensor" else "row"}") in its group'
            )
