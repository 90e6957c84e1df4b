"""Random damages to checkpoints, and what must hold of an optimizer that is given them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.parts.checks import SettingError

Tree = dict[Any, Any] | list[Any]
JUNK = (
    None,
    "x",
    -1,
    -3.5,
    2.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    [],
    {},
    (1, 2),
    object(),
)
"""What may stand in place of any value."""


def one(value: float) -> Callable[[Tensor, random.Random], Tensor]:
    """Return what puts a value in one place of a tensor."""

    def damage(x: Tensor, rng: random.Random) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            x.view(-1)[rng.randrange(x.numel())] = value if x.is_floating_point() else int(value)
        return x

    return damage


TENSORS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "nan": lambda x, rng: one(float("nan"))(x, rng) if x.is_floating_point() else x,
    "inf": lambda x, rng: one(float("inf"))(x, rng) if x.is_floating_point() else x,
    "-inf": lambda x, rng: one(-float("inf"))(x, rng) if x.is_floating_point() else x,
    "negative": one(-1),
    "large": one(120),
    "zero": lambda x, rng: torch.zeros_like(x),
    "opposite": lambda x, rng: -x if x.dtype not in (torch.bool, torch.uint8) else x,
    "huge": lambda x, rng: x * 1e9 if x.is_floating_point() else x,
    "half": lambda x, rng: x.half(),
    "bfloat16": lambda x, rng: x.bfloat16(),
    "double": lambda x, rng: x.double(),
    "integers": lambda x, rng: x.nan_to_num(0, 9, -9).long(),
    "booleans": lambda x, rng: x.bool(),
    "complex": lambda x, rng: x.to(torch.complex64),
    "sparse": lambda x, rng: x.to_sparse(),
    "meta": lambda x, rng: x.to("meta"),
    "flat": lambda x, rng: x.flatten(),
    "deeper": lambda x, rng: x.unsqueeze(0),
    "turned": lambda x, rng: x.mT if x.ndim > 1 else x,
    "shorter": lambda x, rng: x[..., :-1] if x.ndim else x,
    "doubled": lambda x, rng: torch.cat([x, x], -1) if x.ndim else x,
    "mixed": lambda x, rng: x.flip(-1) if x.ndim else x,
    "repeated": lambda x, rng: x[..., :1].expand_as(x).clone() if x.numel() and x.ndim else x,
    "number": lambda x, rng: x.flatten()[0].item() if x.numel() else 0,
    "list": lambda x, rng: x.tolist(),
}  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Tree, Any]]:
    """Yield every container in a tree with each of its keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damaged(state_dict: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """Return a copy of a state dict with one damage, and what that is."""
    tree = copy.deepcopy(state_dict)
    part = rng.choice(["state", "state", "state", "param_groups", None])
    found = list(places(tree if part is None else tree[part]))
    holder, key = rng.choice(found) if found else (tree, "state")
    value = holder[key]
    how = rng.choice(["delete", "junk", "rename", "add", "swap", *["tensor"] * 7])
    if isinstance(value, Tensor) and how == "tensor":
        how = rng.choice(list(TENSORS))
        holder[key] = TENSORS[how](value, rng)
    elif how == "delete":
        del holder[key]
    elif how == "add" and isinstance(value, dict):
        value[rng.choice(["mine", "exp_avg", "residual_norm", "age", 7])] = torch.ones(2)
    elif how == "rename" and isinstance(holder, dict):
        holder[str(key) + rng.choice(["", "x"])] = holder.pop(key)
    elif how == "swap":
        other, place = rng.choice(found)
        holder[key], other[place] = other[place], value
        how = f"swap with {place!r}"
    else:
        how = rng.choice(JUNK)
        holder[key] = how
    return tree, f"{key!r}: {how!r}"


def same(left: Any, right: Any) -> bool:
    """Return whether two trees are equal to the bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(type(left) is type(right) and (left == right or left != left))


def outcome(
    build: Callable[[], tuple[list[Tensor], torch.optim.Optimizer]],
    load: Callable[[torch.optim.Optimizer], None],
) -> str:
    """Return "refused" or "taken" for a load that must be one of these; else say what it is.

    Refused is a SettingError that leaves all as it was; taken is a load after which a step gives
    finite weights.
    """
    params, optimizer = build()
    before = copy.deepcopy((params, optimizer.state_dict()))
    try:
        load(optimizer)
    except SettingError:
        after = (params, optimizer.state_dict())
        return "refused" if same(before, after) else "refused, and something has changed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        optimizer.step()
    except Exception as error:
        return f"taken, and a step fails: {type(error).__name__}: {error}"
    finite = all(bool(param.isfinite().all()) for param in params)
    return "taken" if finite else "taken, and weights are not finite"
