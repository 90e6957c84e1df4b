"""The figures: what they show is a plain value, whose hash the PNG carries."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pretraining.ledger import Ledger
from pretraining.methods import METHODS
from pretraining.tasks import TASKS

from .groups import Settings, all_at_best
from .swaps import sweep_content
from .times import costs

COLOURS = {
    "adamw": "#444444",
    "galore": "#E69F00",
    "dct": "#009E73",
    "fira": "#CC79A7",
    "frugal": "#56B4E9",
    "apollo": "#D55E00",
    "lowrank": "#0072B2",
    "muon": "#882255",
    "normuon": "#117733",
    "ldadam": "#F0E442",
    "trion": "#AA4499",
    "compensated": "#999933",
    "conda": "#88CCEE",
    "rmnp": "#661100",
    "racs": "#DDCC77",
}
KEY = "lowrank-optim results"
"""Name of the text in the PNG that holds the hash."""


@dataclass(frozen=True)
class Figure:
    """What is shown, as JSON can hold it, and how it is drawn."""

    content: Callable[[Ledger], Any]
    draw: Callable[[Any, Any], None]
    size: tuple[float, float] = (11, 3.6)


def save(figure: Figure, content: Any, path: Path) -> None:
    """Draw a figure into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=figure.size, layout="constrained")
    FigureCanvasAgg(drawing)
    figure.draw(drawing, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=160, metadata={KEY: hash_of(content)})


def hash_of(content: Any) -> str:
    """Return the hash of what a figure shows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_in(path: Path) -> str:
    """Return the hash that a PNG carries in a text chunk, empty if there is none."""
    data = path.read_bytes() if path.exists() else b""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        key, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == KEY.encode():
            return text.decode()
        at += length + 12
    return ""


def pretraining(task: str, steps: int | None = None, settings: Settings | None = None) -> Figure:
    """Return the figure of a task: curves, losses by state, and curves by wall time.

    Args:
        task, steps: which runs.
        settings: which methods; all by default.
    """

    def content(ledger: Ledger) -> Any:
        length = steps or TASKS[task].steps
        curves, shown = ledger.curve_of(), {}
        times = costs(task)
        for name, runs in all_at_best(ledger, task, length, settings).items():
            seen = [curves[runs.spec._replace(seed=seed)] for seed in runs.rows]
            points = [
                [step, sum(curve[place][2] for curve in seen) / len(seen)]
                for place, (step, _, _) in enumerate(seen[0])
            ]
            bits = ", 8-bit" if runs.spec.state == "8bit" else ""
            shown[name] = {
                "label": METHODS[name].label + bits,
                "curve": points,
                "losses": sorted(runs.losses.values()),
                "state": runs.state,
                "ms": times.get(name),
            }
        return {"task": task, "methods": shown}

    return Figure(content, draw_pretraining)


def draw_pretraining(drawing: Any, content: Any) -> None:
    """Draw losses by step, by state and, where it was measured, by wall time; one legend."""
    shown = content["methods"]
    timed = any(found["ms"] is not None for found in shown.values())
    curves, states, *rest = drawing.subplots(1, 3 if timed else 2)
    for name, found in shown.items():
        colour = COLOURS[name]
        steps, losses = zip(*found["curve"], strict=True)
        curves.plot(steps, losses, color=colour, lw=1.6, label=found["label"])
        low, mean, high = min(found["losses"]), fmean(found["losses"]), max(found["losses"])
        states.errorbar(
            found["state"] / 2**20, mean, [[mean - low], [high - mean]],
            fmt="o", ms=7, color=colour, capsize=3,
        )  # fmt: skip
        for times in rest if found["ms"] is not None else ():
            times.plot([step * found["ms"] / 1e3 for step in steps], losses, color=colour, lw=1.6)
    curves.set_title("Loss, nats a token, by step", loc="left", fontsize=10)
    states.set_title("At the end, by state in MiB; bars: seeds", loc="left", fontsize=10)
    states.margins(0.15)
    for times in rest:
        times.set_title("By wall time, seconds", loc="left", fontsize=10)
    if shown:
        last = [losses[-1][1] for losses in (found["curve"] for found in shown.values())]
        for axes in (curves, *rest):
            axes.set_ylim(min(last) - 0.1, min(last) + 1.5)
        curves.legend(fontsize=8, frameon=False)
    for axes in (curves, states, *rest):
        finish(axes)


def draw_sweep(drawing: Any, content: Any) -> None:
    """Draw the loss by multiples of AdamW's rates, a curve a method."""
    axes = drawing.subplots()
    for name, found in content["methods"].items():
        factors, losses = zip(*found["points"], strict=True)
        axes.plot(factors, losses, "o-", color=COLOURS[name], lw=1.6, ms=5, label=found["label"])
    axes.set_xscale("log", base=2)
    title = f"Loss at multiples of AdamW's rates, {content['task']}, {content['steps']} steps"
    axes.set_title(title, loc="left", fontsize=10)
    if content["methods"]:
        shown = [factor for found in content["methods"].values() for factor, _ in found["points"]]
        ticks = sorted(set(shown))
        axes.set_xticks(ticks, [f"{factor:g}" for factor in ticks])
        axes.legend(fontsize=8, frameon=False)
    finish(axes)


def finish(axes: Any) -> None:
    """Take away what does not help to read a plot."""
    axes.tick_params(length=0, labelsize=8)
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


LONG: Settings = {"adamw": {}, "lowrank": {}, "muon": {"state": "8bit"}}
FIGURES = {
    "pretrain.png": pretraining("3m"),
    "long.png": pretraining("bytes-128", 4000, LONG),
    "transfer.png": Figure(sweep_content, draw_sweep, (7, 4)),
}
"""Name in docs/ and figure."""
