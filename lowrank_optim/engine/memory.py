"""Bytes of optimizer state, predicted from shapes and counted; the table of `summary()`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..functional.views import matrix_shape
from ..parts.rank import rank_asked, subspace_of
from ..parts.types import Group, State
from ..settings.plans import check_values, plan_of
from ..sharding.local import here, is_distributed
from .backend import reason_of
from .session import session_of
from .sites import plain_layout, sites_of
from .state import template

MIB = 2**20


def tensor_bytes(state: State) -> int:
    """Return the bytes that this process holds of the tensors in one parameter's state."""
    tensors = [here(value) for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in the state of any optimizer, as they are now."""
    return sum(tensor_bytes(state) for state in optimizer.state.values())


def shared_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of bases that layers share: made when needed, never saved."""
    return sum(
        basis.numel() * basis.element_size() for basis in session_of(optimizer).shared.tensors()
    )


def predicted_bytes(optimizer: Optimizer) -> int:
    """Return the bytes that the state takes after the first step, from shapes alone.

    With `rank="auto"` it counts the present ranks, and the largest ones before the first step.
    """
    return sum(row["state"] for row in rows(optimizer))


def adamw_bytes(param: Tensor) -> int:
    """Return what `torch.optim.AdamW` keeps: two moments of the parameter's dtype and a step."""
    return 2 * param.numel() * param.element_size() + 4


def checked(optimizer: Optimizer) -> Iterator[Group]:
    """Yield the groups with the settings that the next step will read, including new changes."""
    session = session_of(optimizer)
    session.note_members()
    for index, group in enumerate(session.placed(optimizer.param_groups)):
        check_values(group, f" in group {index}", least_lr=-math.inf)
        yield group


def rows(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return for each group its parameters, how many are projected, and bytes of state."""
    found = []
    for index, group in enumerate(checked(optimizer)):
        plan = plan_of(group)
        row: dict[str, Any] = {
            "group": index,
            "projector": type(plan.projector).__name__ if group["rank"] is not None else "-",
            "rank": word_of(group["rank"]),
            "tensors": 0,
            "parameters": 0,
            "projected": 0,
            "state": 0,
            "adamw": 0,
        }
        ranks: list[int] = []
        for param, site in sites_of(
            group, plan, session_of(optimizer).shared, None, optimizer.state
        ):
            if not param.requires_grad:
                continue
            if site is not None and site.most is not None:
                if not optimizer.state.get(param):
                    site.rank = site.most
                ranks.append(site.rank)
            layout = plain_layout(param, group, plan) if site is None else site.layout
            row["tensors"] += 1
            row["parameters"] += param.numel()
            row["projected"] += param.numel() if site is not None else 0
            row["state"] += tensor_bytes(template(param, site, group, plan, layout))
            row["adamw"] += adamw_bytes(here(param))
        if ranks:
            row["rank"] = f"{min(ranks)}-{max(ranks)}"
        found.append(row)
    return found


def steppers(optimizer: Optimizer) -> list[str]:
    """Return lines that say how many parameters are stepped by what, and why not by kernels."""
    found: Counter[str] = Counter()
    for group in checked(optimizer):
        plan = plan_of(group)
        for param, site in sites_of(group, plan, session_of(optimizer).shared):
            if param.requires_grad:
                found[reason_of(plan, group, here(param), site is not None)] += 1
    return [f"{count} tensors stepped by {how}" for how, count in found.most_common()]


def word_of(rank: int | float | str | None) -> str:
    """Return a rank as the table shows it."""
    if isinstance(rank, str):
        return "auto"
    return "-" if rank is None else f"{rank:.4g}" if isinstance(rank, float) else str(rank)


def left_plain(optimizer: Optimizer) -> list[str]:
    """Return lines that say how many matrices of groups with a rank are not projected, and why."""
    found: Counter[str] = Counter()
    for group in checked(optimizer):
        plan, rank = plan_of(group), group["rank"]
        rule = (rank_asked(group), group["side"], plan.projector.whole, plan.full)
        for param, site in sites_of(group, plan, session_of(optimizer).shared):
            shape = tuple(param.shape)
            plain = site is None and rank is not None and matrix_shape(shape) is not None
            if plain and param.requires_grad:
                reason = f"the projected axis is no longer than rank {word_of(rank)}"
                if subspace_of(shape, *rule) is not None:
                    reason = f"an axis is shorter than min_dim={group['min_dim']}"
                found[reason] += 1
    return [f"{count} matrices left plain: {reason}" for reason, count in found.most_common()]


def summary(optimizer: Optimizer) -> str:
    """Return a table of `rows`, and lines for all."""
    table = rows(optimizer)
    total = {key: sum(row[key] for row in table) for key in ("tensors", "parameters", "projected")}
    lines = [
        f"{type(optimizer).__name__}: {total['projected'] / max(1, total['parameters']):.1%} of "
        f"{total['parameters']:,} parameters projected",
        f"{'group':>5}  {'projector':<10} {'rank':>6} {'tensors':>8} {'parameters':>14} "
        f"{'projected':>9} {'state MiB':>10} {'AdamW MiB':>10} {'saved':>6}",
    ]
    entire = {"group": "all", "projector": "", "rank": "", **total}
    entire.update({key: sum(row[key] for row in table) for key in ("state", "adamw")})
    for row in [*table, entire]:
        share = row["projected"] / max(1, row["parameters"])
        saved = 1 - row["state"] / max(1, row["adamw"])
        lines.append(
            f"{row['group']:>5}  {row['projector']:<10} {row['rank']:>6} {row['tensors']:>8} "
            f"{row['parameters']:>14,} {share:>9.1%} {row['state'] / MIB:>10.2f} "
            f"{row['adamw'] / MIB:>10.2f} {saved:>6.0%}"
        )
    if any(is_distributed(param) for group in optimizer.param_groups for param in group["params"]):
        lines.append("parameters are counted whole, states as they lie on this process")
    if total["projected"] == 0:
        lines.append(
            f"projects none of its {total['tensors']} parameter tensors and saves nothing: lower "
            "rank or min_dim, or give a rank to the group of the matrices "
            "(lowrank_optim.param_groups finds them)"
        )
    lines += left_plain(optimizer)
    lines += steppers(optimizer)
    if shared := shared_bytes(optimizer):
        lines.append(f"and {shared / MIB:.2f} MiB of bases shared by layers, made when needed")
    skipped = max((int(group["skipped_steps"]) for group in optimizer.param_groups), default=0)
    if skipped:
        lines.append(f"{skipped} steps left out: a gradient was not finite")
    return "\n".join(lines)
