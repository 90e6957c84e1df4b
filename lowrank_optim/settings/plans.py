"""The plan of a group, and which of its settings go together."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..parts.checks import (
    SettingError,
    fail,
)
from ..parts.feeds import Feed
from ..parts.length import LENGTHS
from ..parts.numbers import Number, bare_text, numbers_of, with_numbers
from ..parts.plan import Plan
from ..parts.protocols import Projector, Residual, Rule
from ..parts.rank import AutoRank, rank_asked, rank_of
from ..parts.storage import FEED_STORAGES, STORAGES
from ..parts.types import Group
from .values import CHECKS, PARTS, part_of


def check_values(group: dict[str, Any], where: str, least_lr: float = 0.0) -> None:
    """Check every setting of a group and bring it to its normal form, in place.

    Args:
        group: the settings, beside others.
        where: names the group in a message.
        least_lr: the least rate; a schedule may go below 0, as torch lets it.
    """
    for key, check in CHECKS.items():
        if key in group:
            group[key] = check(key, group[key], where)
    lr = group["lr"]
    if not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) < least_lr:
        raise fail(where, "lr", float(lr), "a number of at least 0, or a tensor of one")
    try:
        plan = plan_of(group)
    except ValueError as error:
        raise SettingError(f"{error}{where}") from None
    for key, each in numbers_in(group).items():
        if key in group:
            group[key] = each.check(key, group[key], where)
    try:
        asked = rank_asked(group)
    except ValueError as error:
        raise SettingError(f"rank={group['rank']!r}{where}: {error}") from None
    if group["capturable"] and not plan.projector.captures:
        raise SettingError(
            f"capturable=True{where} does not go with the projector "
            f"{type(plan.projector).__name__}: a refresh makes tensors that a captured step would "
            "not find"
        )
    if group["capturable"] and not plan.feed.captures:
        raise SettingError(
            f"capturable=True{where} does not go with the feed {type(plan.feed).__name__}, which "
            "reads the number of updates on the host"
        )
    if isinstance(asked, AutoRank):
        check_auto(plan, where)
    elif group["state_budget"] is not None and asked is not None:
        raise SettingError(f'state_budget{where} belongs to rank="auto", not to rank={asked}')
    if plan.takes_turns and isinstance(asked, int):
        raise fail(where, "rank", asked, "a float in (0, 1], the share of matrices that are active")
    if group.get("foreach") and group.get("fused"):
        raise SettingError(f"foreach=True and fused=True{where}: take one of them, or neither")
    if group.get("foreach") and isinstance(group["lr"], Tensor):
        raise SettingError(f"foreach=True{where}: with lr a tensor, torch's AdamW needs fused=True")


def numbers_in(group: Group) -> dict[str, Number]:
    """Return the numbers that the steps of a group read, by key."""
    plan, rank = plan_of(group), rank_of(group["rank"])
    if rank is None:
        return plan.plain_numbers
    return {**plan.numbers, **plan.plain_numbers, **numbers_of(rank)}


def check_auto(plan: Plan, where: str) -> None:
    """Raise SettingError if ranks cannot be chosen from what a projector learns."""
    name = type(plan.projector).__name__
    if not plan.projector.learns:
        raise SettingError(
            f'rank="auto"{where} does not go with the projector {name}, which learns nothing of '
            'the gradient: choose "svd", "power" or "dct"'
        )
    if plan.on_refresh == "align":
        raise SettingError(
            f'rank="auto"{where} does not go with on_refresh="align": bases of different ranks '
            'cannot be aligned, choose "rotate", "keep" or "reset"'
        )


def plan_of(group: Group) -> Plan:
    """Return the plan of a group; equal settings give the same object.

    Raises:
        SettingError: parts that do not go together, or an unknown value that was set later.
    """
    plan = _plan(
        group["feed"],
        group["rule"],
        group["projector"],
        group["residual"],
        group["length"],
        group["state_dtype"],
        group["side"],
        group["on_refresh"],
    )
    other = tuple(
        (key, group[key])
        for key, absent in plan.optional.items()
        if key in group and (group[key] is None) != absent
    )
    return _with_structure(plan, other) if other else plan


@lru_cache(maxsize=256)
def _with_structure(plan: Plan, numbers: tuple[tuple[str, Any], ...]) -> Plan:
    """Return a plan whose parts know which of their numbers are None."""
    there = dict(numbers)
    return replace(plan, **{key: with_numbers(getattr(plan, key), there) for key in PARTS})


@lru_cache(maxsize=256)
def _plan(
    feed: Feed | str,
    rule: Rule | str,
    projector: Projector | str,
    residual: Residual | str,
    length: str,
    dtype: str | None,
    side: str,
    on_refresh: str,
) -> Plan:
    fed: Feed = part_of("feed", feed)
    kept = dtype if fed.dtype is None else fed.dtype
    if kept not in FEED_STORAGES:
        names = ", ".join(repr(name) for name in FEED_STORAGES if name)
        raise fail(f" of the feed {type(fed).__name__}", "dtype", kept, f"None or one of {names}")
    try:
        return Plan(
            feed=fed,
            rule=part_of("rule", rule),
            projector=part_of("projector", projector),
            residual=part_of("residual", residual),
            length=LENGTHS[length],
            storage=STORAGES[dtype],
            feed_storage=FEED_STORAGES[kept],
            side=side,
            on_refresh=on_refresh,
        )
    except ValueError as error:
        raise SettingError(str(error)) from None


def described(group: Group) -> dict[str, str]:
    """Return the structural settings as text that a checkpoint can hold."""
    plan = plan_of(group)
    return {
        **{key: bare_text(getattr(plan, key)) for key in PARTS},
        "side": plan.side,
        "on_refresh": plan.on_refresh,
    }
