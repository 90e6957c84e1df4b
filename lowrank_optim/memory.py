"""What the state of an optimizer takes: from shapes alone, and as it lies in memory."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dispatch import reason_of
from .local import here, is_distributed
from .plan import State
from .settings import SettingError, plan_of
from .sites import plain_layout, sites_of
from .update import template

if TYPE_CHECKING:
    from .optimizer import LowRank

MIB = 2**20


def tensor_bytes(state: State) -> int:
    """Return the bytes of the tensors in one parameter's state, as far as they lie here."""
    tensors = [here(value) for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the state of any optimizer, as they are now."""
    return sum(tensor_bytes(state) for state in optimizer.state.values())


def shared_bytes(optimizer: LowRank) -> int:
    """Return the bytes of bases that layers share: made when needed, never saved."""
    return sum(basis.numel() * basis.element_size() for basis in optimizer._shared.tensors())


def predicted_bytes(optimizer: LowRank) -> int:
    """Return the bytes that the state takes after the first step, from shapes alone.

    With `rank="auto"`, those of the present ranks, before the first step of the largest.
    """
    return sum(row["state"] for row in rows(optimizer))


def adamw_bytes(param: Tensor) -> int:
    """Return what `torch.optim.AdamW` keeps: two moments of the parameter's dtype and a step."""
    return 2 * param.numel() * param.element_size() + 4


def rows(optimizer: LowRank) -> list[dict[str, Any]]:
    """Return for each group its parameters, how many are projected, and bytes of state."""
    found = []
    for index, group in enumerate(optimizer.param_groups):
        plan = plan_of(group)
        row: dict[str, Any] = {
            "group": index,
            "projector": type(plan.projector).__name__ if group["rank"] is not None else "-",
            "rank": group["rank"],
            "tensors": 0,
            "parameters": 0,
            "projected": 0,
            "state": 0,
            "adamw": 0,
        }
        ranks: list[int] = []
        for param, site in sites_of(group, plan, optimizer._shared, None, optimizer.state):
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


def steppers(optimizer: LowRank) -> list[str]:
    """Return lines that say how many parameters are stepped by what, and why not by kernels."""
    found: Counter[str] = Counter()
    for group in optimizer.param_groups:
        plan = plan_of(group)
        for param, site in sites_of(group, plan, optimizer._shared):
            if param.requires_grad:
                found[reason_of(plan, group, here(param), site is not None)] += 1
    return [f"{count} tensors stepped by {how}" for how, count in found.most_common()]


def summary(optimizer: LowRank) -> str:
    """Return a table of `rows`, and a line for all; raise SettingError if nothing is projected."""
    table = rows(optimizer)
    total = {key: sum(row[key] for row in table) for key in ("tensors", "parameters", "projected")}
    if total["projected"] == 0:
        raise SettingError(
            f"{type(optimizer).__name__} projects none of its {total['tensors']} parameter tensors "
            "and would save nothing: lower the rank, or give a rank to the group of the matrices "
            "(lowrank_optim.param_groups finds them)"
        )
    lines = [
        f"{type(optimizer).__name__}: {total['projected'] / total['parameters']:.1%} of "
        f"{total['parameters']:,} parameters projected",
        f"{'group':>5}  {'projector':<10} {'rank':>6} {'tensors':>8} {'parameters':>14} "
        f"{'projected':>9} {'state MiB':>10} {'AdamW MiB':>10} {'saved':>6}",
    ]
    entire = {"group": "all", "projector": "", "rank": "", **total}
    entire.update({key: sum(row[key] for row in table) for key in ("state", "adamw")})
    for row in [*table, entire]:
        rank = "-" if row["rank"] is None else row["rank"]
        share = row["projected"] / max(1, row["parameters"])
        saved = 1 - row["state"] / max(1, row["adamw"])
        lines.append(
            f"{row['group']:>5}  {row['projector']:<10} {rank:>6} {row['tensors']:>8} "
            f"{row['parameters']:>14,} {share:>9.1%} {row['state'] / MIB:>10.2f} "
            f"{row['adamw'] / MIB:>10.2f} {saved:>6.0%}"
        )
    if any(is_distributed(param) for group in optimizer.param_groups for param in group["params"]):
        lines.append("parameters are counted whole, states as they lie on this process")
    lines += steppers(optimizer)
    if shared := shared_bytes(optimizer):
        lines.append(f"and {shared / MIB:.2f} MiB of bases shared by layers, made when needed")
    if optimizer.skipped_steps:
        lines.append(f"{optimizer.skipped_steps} steps left out: a gradient was not finite")
    return "\n".join(lines)
