"""The parameters of an optimizer, known by identity, whoever changes its groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from math import prod
from operator import is_
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..functional.views import matrix_shape
from ..parts.checks import SettingError
from ..parts.types import Group
from ..settings.numbers import fill
from ..sharding.collectives import several


@dataclass
class Member:
    """A parameter of an optimizer.

    Attributes:
        shape: its shape when it was given to the optimizer.
        name: the one in `param_names`; None without names.
        piece: what it is a flat piece of now; None for an ordinary parameter.
        wants: what its state has to fit.
        fits: the tensors of its state when they were last found to fit that, see `Step.check`.
    """

    shape: tuple[int, ...]
    name: str | None = None
    piece: str | None = None
    wants: Any = None
    fits: Any = None

    def look(self, param: Tensor, wants: tuple[Any, ...]) -> None:
        """Note what the parameter is now, and what the states of its group depend on."""
        self.piece = flat_piece(param, self.shape)
        wanted = (param.dtype, param.shape, param.device, wants)
        if self.wants != wanted:
            self.wants, self.fits = wanted, None


class Members:
    """The parameters of an optimizer, by identity and not by place.

    Trainers take parameters out of groups, put others in, and assign whole lists of groups. `note`
    keeps up with that, also with names, and `check` looks at what is new.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, Member] = {}
        self._left: MutableMapping[Tensor, Member] = WeakTensorKeyDictionary()
        self._lists: list[list[Tensor]] = []
        self._new: list[Tensor] = []
        self._gone: list[tuple[int, ...]] = []

    def __getitem__(self, param: Tensor) -> Member:
        return self._known[param]

    def __contains__(self, param: object) -> bool:
        return param in self._known

    def forget_fits(self) -> None:
        """Forget which states were found to fit."""
        for member in self._known.values():
            member.fits = None

    def note(
        self,
        groups: list[dict[str, Any]],
        defaults: Mapping[str, Any],
        scale_of: Callable[[str], float],
    ) -> None:
        """Take note of what has been changed in the groups from outside.

        A group that lacks a setting gets a default, see `fill`. `param_names` follow their
        parameters; a group without, beside others with them, gets names by place.
        """
        for index, group in enumerate(groups):
            fill(group, defaults, scale_of)
            if "params" not in group:
                raise SettingError(f"group {index} has no 'params'")
            if not isinstance(group["params"], list):
                group["params"] = as_list(group["params"], index)
        now = [group["params"] for group in groups]
        if all_same(now, self._lists):
            return
        for index, params in enumerate(now):
            for place, param in enumerate(params):
                if not isinstance(param, Tensor):
                    raise SettingError(
                        f"'params' of group {index} has a value of type {type(param).__name__} at "
                        f"place {place}: every one must be a tensor"
                    )
        if any("param_names" in group for group in groups):
            for index, group in enumerate(groups):
                taken = {name for other in groups for name in other.get("param_names", ())}
                if "param_names" not in group:
                    group["param_names"] = place_names(index, len(group["params"]), taken)
        before, self._known = self._known, {}
        for index, group in enumerate(groups):
            for place, param in enumerate(group["params"]):
                member = before.get(param) or self._left.get(param)
                if member is None:
                    member = Member(tuple(param.shape))
                    self._new.append(param)
                if "param_names" in group and member.name is None:
                    member.name = given_name(group, index, place)
                self._known[param] = member
        for group in groups:
            if "param_names" in group:
                group["param_names"] = [self._known[param].name for param in group["params"]]
        for param, member in before.items():
            if param not in self._known:
                self._left[param] = member
                self._gone.append(member.shape)
        self._lists = [list(params) for params in now]

    def check(self, groups: list[dict[str, Any]]) -> None:
        """Raise an error for a new parameter that cannot be optimized, see `check_param`."""
        new = set(self._new)
        for index, group in enumerate(groups if new else ()):
            for place, param in enumerate(group["params"]):
                if param in new:
                    check_param(param, name_of(group, index, place), self._gone)
        self._new.clear()
        self._gone.clear()


def as_list(params: Any, index: int) -> list[Tensor]:
    """Return the `params` of a group as a list, even if they are no list."""
    if isinstance(params, Tensor):
        return [params]
    if not isinstance(params, Iterable):
        raise SettingError(f"params={params!r} in group {index}: params must be a list of tensors")
    return list(params)


def all_same(now: list[list[Tensor]], seen: list[list[Tensor]]) -> bool:
    """Return whether lists of parameters hold the same objects."""
    if [len(params) for params in now] != [len(params) for params in seen]:
        return False
    return all(all(map(is_, new, old)) for new, old in zip(now, seen, strict=True))


def check_param(param: Tensor, name: str, gone: list[tuple[int, ...]]) -> None:
    """Raise an error for a new parameter that cannot be optimized; a frozen one is only carried.

    Args:
        param: the parameter.
        name: what to call it.
        gone: shapes of the parameters that are in no group any more.

    Raises:
        SettingError: it is trained, and neither real nor floating.
        RuntimeError: it is a flat piece of a matrix.
    """
    if param.requires_grad and not param.is_floating_point():
        raise SettingError(
            f"{name} is {param.dtype}: only real floating-point parameters can be optimized"
        )
    piece = flat_piece(param) or piece_of_all(param, gone)
    if piece is not None:
        raise flat_error(name, piece)


def piece_of_all(param: Tensor, gone: list[tuple[int, ...]]) -> str | None:
    """Return which matrix a new vector is a flat piece of, if it has replaced matrices; else None.

    ZeRO replaces all parameters of a group by one vector as long as all of them, or by a share of
    it on each process. The bias of a new layer is shorter than the layers that it replaces.
    """
    matrices = [shape for shape in gone if matrix_shape(shape)]
    if param.ndim != 1 or not matrices:
        return None
    shares = dist.get_world_size() if several() else 1
    if param.numel() * shares < sum(map(prod, gone)):
        return None
    return f"a matrix of shape {max(matrices, key=prod)}"


def given_name(group: Mapping[str, Any], index: int, place: int) -> str:
    """Return the name that a group gives a new parameter; if it gives none, one by its place."""
    names, count = group["param_names"], len(group["params"])
    return str((names if len(names) == count else place_names(index, count, names))[place])


def place_names(index: int, count: int, taken: Collection[str]) -> list[str]:
    """Return unused names for the parameters of a group that came without names."""
    names = [f"group{index}.{place}" for place in range(count)]
    return names if not set(names) & set(taken) else place_names(index + 1, count, taken)


def name_alike(groups: list[dict[str, Any]], group: dict[str, Any]) -> list[dict[str, Any]]:
    """Name parameters by their places where others have names: torch wants names for all or none.

    Args:
        groups: the groups of the optimizer.
        group: a new one.

    Returns:
        The old groups that got names.
    """
    params = group["params"]
    single = isinstance(params, Tensor)
    taken = {name for other in groups for name in other.get("param_names", ())}
    if "param_names" in group or (not single and any(isinstance(x, tuple) for x in params)):
        bare = [(index, other) for index, other in enumerate(groups) if "param_names" not in other]
        for index, other in bare:
            other["param_names"] = place_names(index, len(other["params"]), taken)
        return [other for _, other in bare]
    if any("param_names" in other for other in groups):
        group["param_names"] = place_names(len(groups), 1 if single else len(params), taken)
    return []


def named(params: Any, where: str) -> list[tuple[str, Tensor]]:
    """Return the tensors in the `params` of a group, each with its name for messages."""
    listed = [params] if isinstance(params, Tensor) else list(params)
    found = []
    for place, item in enumerate(listed):
        name = f"parameter {place}{where}"
        if isinstance(item, tuple):
            name, item = f"parameter {item[0]!r}{where}", item[1]
        if isinstance(item, Tensor):
            found.append((f"{name}, of shape {tuple(item.shape)},", item))
    return found


def flat_piece(param: Tensor, known: tuple[int, ...] | None = None) -> str | None:
    """Return what the parameter is a flat piece of, as ZeRO and FSDP1 hand out; None for others.

    Args:
        param: the parameter as it is now.
        known: its shape when it was given to the optimizer.
    """
    if getattr(param, "_is_flat_param", False):
        return "matrices"
    if param.ndim != 1:
        return None
    for shape in (known, getattr(param, "ds_shape", None)):
        if shape is not None and matrix_shape(tuple(shape)):
            return f"a matrix of shape {tuple(shape)}"
    return "matrices" if getattr(param, "_fsdp_flattened", False) else None


def flat_error(name: str, piece: str) -> RuntimeError:
    """Return the error for a flat piece, which would silently get plain AdamW otherwise."""
    return RuntimeError(
        f"{name} is a flat piece of {piece}: rows and columns are gone, so it cannot be projected. "
        "Shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps them, or use DDP"
    )


def name_of(group: Group, index: int, place: int) -> str:
    """Return what to call a parameter in a message."""
    shape = tuple(group["params"][place].shape)
    names = group.get("param_names")
    if names is not None and place < len(names):
        return f"parameter {names[place]!r} of shape {shape}"
    return f"parameter {place} of group {index}, of shape {shape},"
