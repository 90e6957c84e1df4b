"""The tables and the figure of results/transfer.csv: every method at AdamW's own rates."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pretraining.ledger import Ledger, spec_of
from pretraining.methods import METHODS, Spec
from pretraining.tasks import TASKS
from pretraining.tune import base, tuned
from transfer import (
    CONDITIONS,
    FACTORS,
    LENGTHS,
    SCALES,
    change_of,
    faster,
    reference,
    scaled,
    swapped,
)

from .gpu import RESULTS
from .groups import Row, Runs, conditions
from .layout import NOTHING, table

LEDGER = Ledger(RESULTS / "transfer.csv")
SWEPT = ("bytes-128", 400)
"""Task and steps of the figure."""


@dataclass(frozen=True)
class Found:
    """What a ledger holds of swaps."""

    ledger: Ledger

    @cached_property
    def runs(self) -> dict[Spec, Runs]:
        """Final runs by their setting, with seed 0."""
        rows: dict[Spec, dict[int, Row]] = {}
        for row in self.ledger.rows():
            spec = spec_of(row)
            if spec.split == "final":
                rows.setdefault(spec._replace(seed=0), {})[spec.seed] = row
        return {spec: Runs(spec, dict(sorted(seen.items()))) for spec, seen in rows.items()}

    @cached_property
    def references(self) -> dict[str, Spec]:
        """AdamW's run at its tuned rates by task and steps, where it was made.

        Where no rates were sought for that many steps, they are those of the task's own length.
        """
        made = {(spec.task, spec.steps) for spec in self.runs if spec.method == "adamw"}
        found: dict[str, Spec] = {}
        for task, steps in sorted(made, key=lambda key: (list(TASKS).index(key[0]), key[1])):
            usual = TASKS[task].steps
            for rates_of in dict.fromkeys((steps, usual)):
                with contextlib.suppress(LookupError):
                    spec = reference(self.ledger, task, steps, rates_of)
                    name = f"{task}, {steps}" + (f", rates of {usual}" * (rates_of != steps))
                    if spec in self.runs and spec not in found.values():
                        found[name] = spec
                        break
        return found

    def own(self, like: Spec, method: str) -> Runs | None:
        """Return a method's final runs at the rates that were found for its published length."""
        first = base(like.task, method, like.steps, change=change_of("published"))
        with contextlib.suppress(LookupError):
            best, _, _ = tuned(self.ledger, first)
            return self.runs.get(best._replace(split="final", seed=0))
        return None


def made_of(show: Callable[[Found], tuple[list[str], list[list[str]], list[Runs]]]) -> Any:
    """Return the table that `show` makes: heads, lines, and the runs that they are from."""

    def made(_: Ledger) -> str:
        heads, lines, used = show(Found(LEDGER))
        if not used:
            return NOTHING
        texts = ", ".join(sorted({row["text"] for runs in used for row in runs.rows.values()}))
        return f"{table(heads, lines)}\n\nText {texts}, {conditions(used)}"

    return made


def swaps(found: Found) -> tuple[list[str], list[list[str]], list[Runs]]:
    """Show the loss of each length at AdamW's rates, beside the method's own tuned best."""
    lines, used = [], []
    for place, like in found.references.items():
        adamw = found.runs[like]
        block, kept = [], [adamw]
        for name in list(METHODS)[1:]:
            at = [found.runs.get(swapped(like, name, length)) for length in LENGTHS]
            own = found.own(like, name)
            if any(at):
                kept += [runs for runs in (*at, own) if runs]
                best = [value(own), f"{own.spec.lr:g}, {own.spec.rest_lr:g}"] if own else ["-", "-"]
                block.append([METHODS[name].label, *map(value, at), relative(at[-1], adamw), *best])
        if block:
            used += kept
            rates = f"{like.lr:g}, {like.rest_lr:g}"
            first = [METHODS["adamw"].label, *["-"] * len(LENGTHS), "-", value(adamw), rates]
            lines += [[line[0], place, *line[1:]] for line in (first, *block)]
    heads = [
        "method", "task, steps", "published length", "RMS 0.2", "AdamW's length", "to AdamW",
        "own tuned best", "at lr, rest lr",
    ]  # fmt: skip
    return heads, lines, used


def directions(found: Found) -> tuple[list[str], list[list[str]], list[Runs]]:
    """Show each direction at AdamW's length beside AdamW, the best first."""
    lines, used = {}, []
    columns = {
        key: like
        for key, like in found.references.items()
        if any(swapped(like, name) in found.runs for name in list(METHODS)[1:])
    }
    for name in METHODS:
        cells = []
        for like in columns.values():
            runs, adamw = found.runs.get(swapped(like, name)), found.runs[like]
            beside = "" if runs in (None, adamw) else f", {relative(runs, adamw)}"
            cells.append(value(runs) + beside)
            if runs is not None:
                used.append(runs)
                lines.setdefault(name, (shares(runs, adamw), cells))
    ordered = sorted(lines, key=lambda name: statistics.fmean(lines[name][0]))
    heads = ["direction", *columns]
    return heads, [[METHODS[name].label, *lines[name][1]] for name in ordered], used


def scale_table(found: Found) -> tuple[list[str], list[list[str]], list[Runs]]:
    """Show the loss of each multiple of AdamW's length; AdamW's of the rate of its matrices."""
    lines, used = [], []
    for place, like in found.references.items():
        for name in METHODS:
            at = alike([found.runs.get(scaled(like, name, scale)) for scale in SCALES])
            kept = [runs for runs in at if runs]
            if len(kept) > 1:
                used += kept
                best = min(kept, key=lambda runs: runs.mean)
                lines.append([
                    METHODS[name].label, place, *map(value, at),
                    f"{SCALES[at.index(best)]:g}", relative(best, found.runs[like]),
                ])  # fmt: skip
    heads = ["method", "task, steps", *(f"{scale:g}" for scale in SCALES), "best", "to AdamW at 1"]
    return heads, lines, used


def sweep_table(found: Found) -> tuple[list[str], list[list[str]], list[Runs]]:
    """Show the loss at multiples of both of AdamW's rates."""
    lines, used = [], []
    for place, like in found.references.items():
        for name in METHODS:
            at = alike([found.runs.get(faster(swapped(like, name), factor)) for factor in FACTORS])
            kept = [runs for runs in at if runs]
            if len(kept) > 1:
                used += kept
                best = min(kept, key=lambda runs: runs.mean)
                where = f"{FACTORS[at.index(best)]:g}"
                lines.append([METHODS[name].label, place, *map(value, at), where])
    heads = ["method", "task, steps", *(f"{factor:g}" for factor in FACTORS), "best at"]
    return heads, lines, used


def condition_table(found: Found) -> tuple[list[str], list[list[str]], list[Runs]]:
    """Show the loss of AdamW under each condition, and each method's beside it."""
    lines, used = [], []
    for place, like in found.references.items():
        for name in METHODS:
            cells, kept = [], []
            for changed in CONDITIONS.values():
                adamw = found.runs.get(changed(like))
                runs = found.runs.get(changed(swapped(like, name)))
                cells.append(value(runs) if name == "adamw" else relative(runs, adamw))
                kept += [runs] if runs else []
            if kept:
                used += kept
                lines.append([METHODS[name].label, place, *cells])
    return ["method", "task, steps", *CONDITIONS], lines, used


def alike(many: list[Runs | None]) -> list[Runs | None]:
    """Return runs with those seeds only that all of them have, so that means can be compared."""
    held = [set(runs.rows) for runs in many if runs]
    seeds = set.intersection(*held) if held else set()
    if not seeds:
        return [None] * len(many)
    return [
        runs and replace(runs, rows={seed: runs.rows[seed] for seed in sorted(seeds)})
        for runs in many
    ]


def value(runs: Runs | None) -> str:
    """Show a mean over seeds, and the range."""
    if runs is None:
        return "-"
    losses = runs.losses.values()
    bounds = f" ({min(losses):.3f} - {max(losses):.3f})" if len(losses) > 1 else ""
    return f"{runs.mean:.3f}{bounds}"


def relative(runs: Runs | None, other: Runs | None) -> str:
    """Show by how much a loss is above another, seed by seed."""
    above = shares(runs, other) if runs and other else []
    if not above:
        return "-"
    bounds = f" ({min(above):+.1%} to {max(above):+.1%})" if len(above) > 1 else ""
    return f"{statistics.fmean(above):+.1%}{bounds}"


def shares(runs: Runs, other: Runs) -> list[float]:
    """Return by which share each seed's loss is above another setting's."""
    mine, theirs = runs.losses, other.losses
    return [mine[seed] / theirs[seed] - 1 for seed in mine if seed in theirs]


def sweep_content(_: Ledger) -> Any:
    """Return the curves of the figure: means over seeds by factor."""
    found, shown = Found(LEDGER), {}
    like = found.references.get(", ".join(map(str, SWEPT)))
    for name in METHODS if like else ():
        assert like is not None
        at = alike([found.runs.get(faster(swapped(like, name), factor)) for factor in FACTORS])
        pairs = zip(FACTORS, at, strict=True)
        points = [[factor, round(runs.mean, 4)] for factor, runs in pairs if runs]
        if len(points) > 1:
            shown[name] = {"label": METHODS[name].label, "points": points}
    return {"task": SWEPT[0], "steps": SWEPT[1], "methods": shown}


TABLES = {
    "transfer-swap": made_of(swaps),
    "transfer-directions": made_of(directions),
    "transfer-scales": made_of(scale_table),
    "transfer-sweep": made_of(sweep_table),
    "transfer-conditions": made_of(condition_table),
}
