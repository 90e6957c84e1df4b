"""Saving and loading: plain tensors and numbers, unchanged dtypes, and no silent mismatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .geometry import Shape, subspace_of
from .local import is_distributed
from .plan import Group, Plan, Site, State
from .settings import STRUCTURE, SettingError, described, kind_of, plan_of
from .sites import name_of, plain_layout, sites_of
from .update import step_device, template

if TYPE_CHECKING:
    from .optimizer import LowRank


STATE_VERSION = 1
"""Version of the layout of a state; a number in every group of a checkpoint."""

LIVE = (*STRUCTURE, "impl", "capturable", "foreach", "fused", "shard_basis")
"""Settings that stay as they are here: what the state means, and how this machine steps it."""


def portable(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose groups hold text where they held objects."""
    groups = [{**group, **described(group)} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def load(
    optimizer: LowRank,
    state_dict: dict[str, Any],
    load_as_torch: Callable[[dict[str, Any]], None],
) -> None:
    """Load through torch's own method, which runs the user's hooks, and mend what it does.

    Torch casts floating-point state to the dtype of the parameter. Our hooks stand innermost: after
    the user's pre-hooks the checkpoint is checked and kept; before his post-hooks the state is
    taken from it again as it was saved.
    """
    kept: dict[str, Any] = {}
    live = [dict(group) for group in optimizer.param_groups]

    def check_and_keep(_: Any, incoming: dict[str, Any]) -> None:
        check(optimizer, incoming)
        kept.update(incoming)

    def restore(_: Any) -> None:
        saved_groups = kept["param_groups"]
        for group, saved, own in zip(optimizer.param_groups, saved_groups, live, strict=True):
            group.update({k: v for k, v in own.items() if k in LIVE or k not in saved})
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            plan = plan_of(group)
            each = plan.each(group)
            sites = sites_of(group, plan, optimizer._shared)
            for saved_id, (param, site) in zip(saved["params"], sites, strict=True):
                if saved_id not in kept["state"]:
                    continue
                layout = plain_layout(param, group, plan) if site is None else site.layout
                state = kept["state"][saved_id]
                counter = step_device(param, state if site is None else None, group, plan)
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        home = counter if key in ("step", "age") else param.device
                        value = layout.kept(value.detach(), each.of(key), home)
                    optimizer.state[param][key] = value

    before = optimizer.register_load_state_dict_pre_hook(check_and_keep)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        load_as_torch(state_dict)
    finally:
        before.remove()
        after.remove()


def check(optimizer: LowRank, state_dict: dict[str, Any]) -> None:
    """Raise SettingError if the checkpoint does not fit; change nothing."""
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        raise SettingError(
            "the checkpoint has groups of "
            f"{[len(g['params']) for g in saved_groups]} parameters, this optimizer of "
            f"{[len(g['params']) for g in groups]}: build it with the same groups"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        version = saved.get("state_version", STATE_VERSION)
        if version != STATE_VERSION:
            raise SettingError(
                f"the checkpoint has state_version {version}, this package reads {STATE_VERSION}: "
                "upgrade lowrank-optim"
            )
        for key, value in described(group).items():
            if key in saved and kind_of(str(saved[key])) != kind_of(value):
                raise SettingError(
                    f"the checkpoint was made with {key}={saved[key]} in group {index}, this "
                    f"optimizer has {value}: build it with the checkpoint's setting to resume, or "
                    "start without its optimizer state"
                )
        merged = {k: saved.get(k, v) if k not in STRUCTURE else v for k, v in group.items()}
        merged["params"] = group["params"]
        plan = plan_of(merged)
        states = {
            param: state_dict["state"].get(saved_id) or {}
            for param, saved_id in zip(group["params"], saved["params"], strict=True)
        }
        for place, (param, site) in enumerate(
            sites_of(merged, plan, optimizer._shared, states=states)
        ):
            name, shape = name_of(group, index, place), tuple(param.shape)
            state = states[param]
            ranks = f"rank {saved.get('rank')} in the checkpoint, {group['rank']} here"
            if "rank" in saved and not same_rank(shape, saved["rank"], group["rank"], plan):
                raise SettingError(f"the ranks of {name} differ: {ranks}")
            if state:
                check_state(name, param, site, state, merged, plan)


def same_rank(shape: Shape, there: Any, here: Any, plan: Plan) -> bool:
    """Return whether two settings of `rank`, that of a checkpoint and ours, come to the same."""
    if isinstance(there, str) or isinstance(here, str):
        return isinstance(there, str) and isinstance(here, str)
    spaces = [
        subspace_of(shape, rank, plan.side, plan.projector.whole, plan.full)
        for rank in (there, here)
    ]
    return spaces[0] == spaces[1]


def check_state(
    name: str, param: Tensor, site: Site | None, state: State, group: Group, plan: Plan
) -> None:
    """Raise SettingError if the saved state of one parameter is not of the shape it needs."""
    if site is not None and "step" in state:
        site.step = max(0, int(state["step"]) - 1)
    wanted = template(param, site, group, plan)
    for key in sorted({*wanted, *state}):
        if key not in state or key not in wanted:
            where = "this optimizer" if key not in state else "the checkpoint"
            raise SettingError(f"only {where} has {key!r} for {name}")
        if isinstance(wanted[key], Tensor):
            if is_distributed(state[key]) and not is_distributed(param):
                raise SettingError(
                    f"{key!r} of {name} is sharded in the checkpoint and the parameter is not: "
                    "load it with torch.distributed.checkpoint, which puts it together"
                )
            shape = tuple(state[key].shape) if isinstance(state[key], Tensor) else None
            if shape is not None and state[key].dtype != wanted[key].dtype:
                raise SettingError(
                    f"{key!r} of {name} is {state[key].dtype} in the checkpoint and would be "
                    f"{wanted[key].dtype} here: build the optimizer with the checkpoint's "
                    "state_dtype"
                )
            if shape != tuple(wanted[key].shape):
                param_is_auto = site is not None and plan.side == "auto"
                raise SettingError(
                    f"{key!r} of {name} has shape {shape} in the checkpoint and "
                    f"{tuple(wanted[key].shape)} here: another side, or other parameters"
                    + (' (side="auto" goes by the sharding: take "right")' if param_is_auto else "")
                )
