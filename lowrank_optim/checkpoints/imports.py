"""Checkpoints of galore-torch, fira and apollo-torch, read into our optimizers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine.members import name_of
from ..engine.session import session_of
from ..engine.sites import sites_of
from ..engine.state import init_state
from ..functional import Noise, compute_dtype, stream_of
from ..parts.checks import SettingError
from ..parts.storage import moments_of, shape_of, store_moments
from ..parts.types import Site, State
from ..settings.plans import check_values, plan_of
from .foreign import (
    APOLLO,
    ONLY_THERE,
    Pair,
    check_entries,
    check_group,
    check_pair,
    is_random,
    package_of,
    read,
    state_dicts,
)
from .load import LIVE, load
from .pairing import check_form
from .states import values_of


def import_state(
    optimizer: Optimizer,
    source: str | os.PathLike[str] | dict[str, Any],
    *,
    keep: Iterable[str] = (),
) -> None:
    """Load an optimizer checkpoint of galore-torch, fira or apollo-torch, to go on with that run.

    Of `galore_torch.GaLoreAdamW`, `fira.FiraAdamW` and `apollo_torch.APOLLOAdamW`, into
    `GaLoreAdamW`, `FiraAdamW` and `ApolloAdamW` built with the same groups in the same order; the
    packages need not be installed. As `load_state_dict` does, this takes every number of the groups
    from the checkpoint (lr, betas, eps, weight_decay, update_proj_gap, scale), and what trainers
    keep there; rank, side and the other structure must agree. Our `state_dtype` is kept to. Their
    updates have the published length: with `length="rms"` our `scale` has to be kept, and
    `length="adamw"` is refused, for the checkpoint has no sample.

    Subspace, moments, limiter and step count of galore-torch and fira go on as they were. With
    `stagger=False` the next refresh falls on the step where theirs would; otherwise on the next
    turn of the matrix, within `update_proj_gap` steps from here.

    A random subspace of apollo-torch is not drawn again here: its moments are carried into a new
    one as at each of its own refreshes, multiplied by sqrt(rank / cols), their squares by
    rank / cols, for its Gaussian projection keeps lengths where our orthonormal one shortens them.
    Its scale s becomes s rank / cols, which makes steps as long as there, and its limiter is read
    as with `scale_front=False`, the default there. With `proj="svd"` all goes on as it was.

    Args:
        optimizer: ours; what state it has is replaced.
        source: a state dict, or the path of a file that has one, alone or in dicts and lists. A
            file is read with `weights_only=True`.
        keep: settings that stay as they are here, such as "lr".

    Raises:
        ValueError: what cannot be imported: another class, rank, side, grouping or shape,
            `proj_type="full"`, 8-bit and Adafactor states, a checkpoint without state as layer-wise
            training leaves it. The message names the parameter. Nothing is changed then.
        TypeError: the optimizer is not one of ours.
    """
    session_of(optimizer, "import_state loads into")
    held = read(source) if isinstance(source, (str, os.PathLike)) else source
    found = list(state_dicts(held))
    if len(found) != 1:
        raise SettingError(
            f"the source holds {len(found)} optimizer state dicts (with 'state' and "
            "'param_groups'): pass the one to be imported"
        )
    check_form(found[0])
    load(optimizer, converted(optimizer, found[0], tuple(keep)), tells=False)


def converted(optimizer: Optimizer, saved: dict[str, Any], keep: tuple[str, ...]) -> dict[str, Any]:
    """Return their state dict in our layout, on the same devices; change nothing."""
    groups, others, held = optimizer.param_groups, saved["param_groups"], saved["state"]
    if not any("step" in theirs for theirs in held.values()):
        raise SettingError(
            "the checkpoint holds no state: it was saved before the first step, or by layer-wise "
            "training, which does not save it. Start without it"
        )
    package = package_of(others)
    for key in keep:
        if key not in groups[0]:
            raise SettingError(f"keep={key!r} is no setting of this optimizer")
    if [len(group["params"]) for group in groups] != [len(other["params"]) for other in others]:
        raise SettingError(
            f"the checkpoint has groups of {[len(other['params']) for other in others]} "
            f"parameters, this optimizer of {[len(group['params']) for group in groups]}: build it "
            "with the same groups"
        )
    states: dict[Any, State] = {}
    taken_groups, position = [], 0
    for index, (group, other) in enumerate(zip(groups, others, strict=True)):
        where = f" in group {index}"
        names = [name_of(group, index, place) for place in range(len(group["params"]))]
        for name, saved_id in zip(names, other["params"], strict=True):
            check_entries(name, held.get(saved_id, {}), package)
        check_group(other, package, plan_of(group), where)
        taken = {"scale": other["alpha"]} if "alpha" in other else {}
        taken.update((k, v) for k, v in other.items() if k not in (*LIVE, *ONLY_THERE))
        taken = {key: value for key, value in taken.items() if key not in keep}
        merged = {**group, **taken, "params": group["params"]}
        check_values(merged, where)
        plan = plan_of(merged)
        if "scale" in taken and plan.length.measured:
            raise SettingError(
                f"the checkpoint's scale={taken['scale']}{where} is of updates of their published "
                f"length, this optimizer has length={group['length']!r}: build it with "
                'length="published", or pass keep=("scale",)'
            )
        sites = sites_of(merged, plan, session_of(optimizer).shared)
        if "scale" in taken and is_random(other):
            scale = float(merged["scale"])
            merged["scale"] = taken["scale"] = scale * share(sites, scale, where)
        for name, saved_id, (param, site) in zip(names, other["params"], sites, strict=True):
            position += 1
            theirs = held.get(saved_id, {})
            if theirs:
                pair = Pair(name, param, site, position, merged, plan, theirs, other, package)
                check_pair(pair)
                states[saved_id] = state_of(pair)
        taken_groups.append(taken)
    return {"state": states, "param_groups": taken_groups}


def share(sites: list[tuple[Tensor, Site | None]], scale: float, where: str) -> float:
    """Return rank / cols, which has to be the same for all matrices of a group."""
    ratios = sorted({site.rank / site.cols for _, site in sites if site is not None})
    if len(ratios) > 1:
        scales = ", ".join(f"{scale * ratio:.3g}" for ratio in ratios)
        raise SettingError(
            f"the matrices{where} have projected axes of different lengths, so the checkpoint's "
            f"scale={scale} is no single number here but {scales}: split the group, there "
            'and here, or choose one when the optimizer is built and pass keep=("scale",)'
        )
    return ratios[0] if ratios else 1.0


def state_of(pair: Pair) -> State:
    """Return their state of one parameter in our layout, on the same device."""
    name, param, site, theirs, plan = pair.name, pair.param, pair.site, pair.theirs, pair.plan
    home = theirs["exp_avg"].device
    site = None if site is None else replace(site, device=home)
    like = torch.empty(param.shape, dtype=param.dtype, device=home)
    state = init_state(like, site, pair.group, plan)
    count = int(theirs["step"])
    for key in ("step", "age"):
        if key in state:
            state[key].fill_(count)
    transposed = site is not None and site.layout.wide
    dtype = compute_dtype(param.dtype)
    moments = {
        slot: oriented(repr(slot), name, theirs[slot], transposed, shape_of(state, slot)).to(dtype)
        for slot in plan.rule.slots
    }
    if site is not None:
        ratio = 1.0
        if is_random(pair.other):
            ratio = site.rank / site.cols
            moments["exp_avg"] = moments["exp_avg"] * math.sqrt(ratio)
            moments["exp_avg_sq"] = moments["exp_avg_sq"] * ratio
            state["drawn"] = max(0, count - 1) // site.gap * site.gap
        else:
            basis, ours = theirs["projector"].ortho_matrix, state["basis"]
            ours.copy_(oriented("the basis", name, basis, not transposed, ours.shape))
            state["pending"] = 0
            state["unset"].fill_(False)
        norm = float(values_of("the limiter's norm", theirs.get(pair.package.norm, 0.0), True))
        if pair.package is APOLLO:
            norm *= math.sqrt(plan.length.inside(pair.group)["scale"] / ratio)
        if "residual_norm" in state and 0 < norm < math.inf:
            state["residual_norm"].fill_(norm)
    noise = Noise(pair.group["seed"], count, stream_of(pair.position))
    held = moments_of(state, plan.rule.slots)
    store_moments(held, moments, plan.rule, noise, plain=site is None)
    return state


def oriented(what: str, name: str, value: Tensor, transposed: bool, wanted: torch.Size) -> Tensor:
    """Return a tensor of theirs as it lies here; raise if its shape is another."""
    value = value.mT if transposed and value.ndim > 1 else value
    if value.shape != wanted:
        raise SettingError(
            f"{what} of {name} has shape {tuple(value.shape)} in the checkpoint and "
            f"{tuple(wanted)} here, with the projected axis last: these are other parameters, or "
            "other groups"
        )
    return value
