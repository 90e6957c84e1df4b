"""The state of one parameter in a checkpoint: whether it can be taken, and taking it."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.sites import plain_layout
from ..engine.state import Moment, moments_to_be, owned, step_device, template
from ..functional import load, store
from ..parts.checks import SettingError
from ..parts.kinds import COUNT, NOT_NEGATIVE, NUMBER, Kind
from ..parts.plan import Plan
from ..parts.storage import forms, keys_of, stored
from ..parts.types import Group, Site, State
from ..sharding.collectives import any_of
from ..sharding.layout import Layout, cut_alike
from ..sharding.local import here, is_distributed

LARGE = 2.0**53
"""Beyond it, numbers of a checkpoint need not be told apart."""

MIDDLE = (1 << 15) - 1
"""Random bits that round to nearest."""


class Saved(NamedTuple):
    """A parameter here, what a message calls it, and its state in a checkpoint."""

    name: str
    param: Tensor
    site: Site | None
    state: State
    group: Group
    plan: Plan

    @property
    def layout(self) -> Layout:
        """Which part of the parameter lies here."""
        if self.site is not None:
            return self.site.layout
        return plain_layout(self.param, self.group, self.plan)

    @property
    def squares(self) -> tuple[str, ...]:
        """The moments that are averages of squares."""
        rule = self.plan.rule
        return (rule if self.site is not None else rule.plain).squares

    def wanted(self) -> State:
        """Return what the state of the whole parameter would be here, on "meta"."""
        return template(self.param, self.site, self.group, self.plan)

    def moments(self, like: Tensor) -> list[Moment]:
        """Return its moments, as far as they belong to `like`, the held part of the parameter."""
        return list(moments_to_be(like, self.site, self.plan, self.param.numel()))


def check(saved: Saved) -> None:
    """Raise SettingError if the state cannot be taken; change nothing.

    It checks keys, shapes, dtypes and, by one reduction for each tensor, values. A moment may be
    stored in another way than here. Keys that no method has belong to a wrapper.
    """
    name, state = saved.name, saved.state
    if saved.site is not None:
        if "step" in state:
            check_entry(saved, "step", torch.zeros((), device="meta"))
            saved.site.step = max(0, int(state["step"]) - 1)
        if not 0 < saved.site.rank <= saved.site.cols:
            raise SettingError(f"{name} has no subspace in the checkpoint that it could have here")
    wanted = saved.wanted()
    known: set[str] = set()
    param, meta = saved.param, torch.device("meta")
    like = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=meta)
    for slot, _, shape, size in saved.moments(like):
        keys, here_keys = keys_of(state, slot), keys_of(wanted, slot)
        if not keys:
            raise SettingError(f"only this optimizer has {here_keys[0]!r} for {name}")
        form = forms(slot)[keys].zeros(slot, shape_in(saved, slot, shape), like, size)
        for key in keys:
            check_entry(saved, key, form.get(key))
        known.update((*keys, *here_keys))
    for key in (key for key in wanted if key not in known):
        if key not in state:
            raise SettingError(f"only this optimizer has {key!r} for {name}")
        check_entry(saved, key, wanted[key])
        known.add(key)
    for key in state:
        if key not in known and key in owned():
            raise SettingError(f"only the checkpoint has {key!r} for {name}")


def shape_in(saved: Saved, slot: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a moment must have: as here, or empty if its matrix may sit out."""
    projector, site = saved.plan.projector, saved.site
    if site is None or not projector.whole or projector.everything or slot not in saved.plan.slots:
        return shape
    value = saved.state[keys_of(saved.state, slot)[0]]
    width = tuple(value.shape[-1:]) if isinstance(value, Tensor) else ()
    return (*shape[:-1], *width) if width in ((0,), (site.cols,)) else shape


def check_entry(saved: Saved, key: str, wanted: Any) -> None:
    """Raise SettingError if an entry has another form than wanted, or values of another kind."""
    name, value, kind = saved.name, saved.state[key], kind_at(saved, key)
    if wanted is None:
        raise SettingError(f"only the checkpoint has {key!r} for {name}")
    where = f"{key!r} of {name}"
    alone = not isinstance(wanted, Tensor) or kind is COUNT
    value = values_of(where, value, alone, saved.param.is_meta)
    if is_distributed(value) and not is_distributed(saved.param):
        raise SettingError(
            f"{where} is sharded in the checkpoint and the parameter is not: load it with "
            "torch.distributed.checkpoint, which puts it together"
        )
    shape = tuple(wanted.shape) if isinstance(wanted, Tensor) else ()
    if tuple(value.shape) != shape:
        auto = saved.site is not None and saved.plan.side == "auto"
        raise SettingError(
            f"{where} has shape {tuple(value.shape)} in the checkpoint and {shape} here: another "
            "side, or other parameters"
            + (' (side="auto" goes by the sharding: take "right")' if auto else "")
        )
    if not alone and not convertible(value.dtype, wanted.dtype):
        raise SettingError(f"{where} is {value.dtype} in the checkpoint, not {wanted.dtype}")
    if kind is None or value.is_meta:
        return
    fine = kind.allows(here(value), 0 if saved.site is None else saved.site.cols)
    if is_distributed(value):  # what one process refuses, all do: none may wait for another
        fine = not any_of(not fine, [saved.layout.everyone], here(saved.param).device)
    if not fine:
        raise unkind(where, kind)


def values_of(where: str, value: Any, alone: bool, meta: bool = False) -> Tensor:
    """Return an entry as a dense tensor of real values; raise SettingError for anything else.

    Args:
        where: what the message calls it.
        value: the entry.
        alone: whether it is a single number, of Python or in a tensor.
        meta: whether a tensor may have no values.
    """
    if isinstance(value, numbers.Real) and alone:
        value = torch.tensor(min(max(value, -LARGE), LARGE), dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor):
        raise SettingError(f"{where} is a {type(value).__name__} in the checkpoint")
    if value.layout is not torch.strided or value.is_quantized or value.is_complex():
        raise SettingError(f"{where} is no dense tensor of real numbers in the checkpoint")
    if value.is_meta and (alone or not meta):
        raise SettingError(
            f'{where} is on "meta" in the checkpoint, without values: load the file with '
            "map_location"
        )
    return value


def unkind(where: str, kind: Kind) -> SettingError:
    """Return the error for an entry whose values are not of its kind."""
    return SettingError(
        f"{where} must be {kind.wanted}, which it is not in the checkpoint: take an earlier "
        "checkpoint, or remove the state of this parameter to start it anew"
    )


def kind_at(saved: Saved, key: str) -> Kind | None:
    """Return what values an entry may have; None for any."""
    _, _, part = key.partition(".")
    if part and key not in saved.plan.length.keys:
        return NOT_NEGATIVE if part == "scale" else None
    return saved.plan.kinds.get(key, NUMBER)


def convertible(there: torch.dtype, here: torch.dtype) -> bool:
    """Return whether values of a checkpoint keep their meaning in the dtype that is wanted."""
    return there == here or (there.is_floating_point and here.is_floating_point)


def take(saved: Saved, into: dict[str, Any]) -> None:
    """Copy a checked state into the state of the parameter, in the form that this optimizer keeps.

    Moments are converted to the storage that is asked for: by a cast between plain tensors,
    otherwise decoded and rounded to the nearest code; what lies in that storage keeps its bits. A
    wrapper's own keys are kept as they are, on the device of the parameter.
    """
    _, param, site, state, group, plan = saved
    layout, each, wanted = saved.layout, plan.each(group), saved.wanted()
    view = layout.view(into, each)
    known: set[str] = set()
    like = param
    if layout.mesh is not None:
        like = torch.empty(layout.held, dtype=param.dtype, device=param.device)
    for moment in saved.moments(like):
        keys, ours = keys_of(state, moment.slot), keys_of(wanted, moment.slot)
        known.update((*keys, *ours))
        if keys == ours:
            for key in keys:
                value = state[key].detach().to(wanted[key].dtype)
                into[key] = layout.kept(value, each.of(key), param.device)
        else:
            view.update(converted(saved, moment, like))
    home = step_device(param, view if site is None else None, group, plan)
    for key, value in state.items():
        if key in known:
            continue
        if key not in wanted:
            into[key] = kept_as_is(value, param.device)
        elif not isinstance(wanted[key], Tensor):
            into[key] = int(value)
        else:
            if not isinstance(value, Tensor):
                value = torch.tensor(value, device="cpu")
            device = home if plan.kinds.get(key) is COUNT else param.device
            value = value.detach().to(wanted[key].dtype)
            into[key] = layout.kept(value, each.of(key), device)
    for key in [*wanted, *(key for key in state if key not in wanted)]:
        if key in into:  # the order of a state that was never saved
            into[key] = into.pop(key)


def converted(saved: Saved, moment: Moment, like: Tensor) -> State:
    """Return what is held here of a moment, in the storage that is asked for."""
    slot, square = moment.slot, moment.slot in saved.squares
    found = stored(saved.state, slot)
    if isinstance(found, Tensor):
        dense = found.detach()
    else:
        codes, scale = found
        values = load((here(codes), here(scale)), torch.float32, square)
        packed = codes.dtype == torch.int8
        length = moment.shape[-1] if packed else codes.shape[-1]
        dense = cut_alike(values[..., :length], (*codes.shape[:-1], length), codes)
    dense = here(saved.layout.kept(dense, "row", saved.param.device))
    fresh = moment.storage.zeros(slot, tuple(dense.shape), like, moment.size)
    target = stored(fresh, slot)
    if isinstance(target, Tensor):
        target.copy_(dense)
    else:
        store(target, dense, square, lambda: torch.full_like(dense, MIDDLE, dtype=torch.int32))
    return fresh


def kept_as_is(value: Any, device: torch.device) -> Any:
    """Return a copy of what a wrapper keeps in a state, its tensors on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: kept_as_is(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(kept_as_is(item, device) for item in value)
    return value
