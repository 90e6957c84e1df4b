"""What the demo leaves behind: one dictionary, shown as a table, a JSON file and a figure."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..terminal import whole_file
from .corpus import Corpus
from .recipes import BETAS, RECIPES, WEIGHT_DECAY
from .train import Run, Settings

MIB = 2**20
FILES = NUMBERS, PICTURE = "demo.json", "demo.png"
BASELINE = "adamw"
# A little above the loss of a uniform guess: only a diverging run goes further, and is cut off.
CEILING = 1.1 * math.log(256)
# Spread of a method's loss over three seeds at the default settings:
# benchmarks/results/demo_seeds.csv.
SEED_NOISE = 0.05
# Okabe and Ito's palette, told apart under every common colour blindness; dashed the second time.
PALETTE = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
COLOURS = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(RECIPES)}
DASHED = frozenset(tuple(RECIPES)[len(PALETTE) :])


def results(runs: Sequence[Run], corpus: Corpus, settings: Settings) -> dict[str, Any]:
    """Put conditions and rows into one JSON-ready dictionary.

    Losses are in nats a byte (null where training diverged), times in milliseconds;
    `saved` is the share of AdamW's state that is not needed, null without AdamW to compare with.
    """
    import transformers

    baseline = next((run.state_bytes for run in runs if run.name == BASELINE), None)
    rows = []
    for run in runs:
        saved = None
        if baseline is not None and run.name != BASELINE:
            saved = 1 - run.state_bytes / baseline
        rows.append(asdict(run) | {"state_mib": run.state_bytes / MIB, "saved": saved})
    conditions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "corpus": corpus.name,
        "train_bytes": corpus.train.numel(),
        "validation_bytes": corpus.validation.numel(),
        "parameters": runs[0].parameters,
        "betas": BETAS,
        "weight_decay": WEIGHT_DECAY,
    }
    finite: dict[str, Any] = _finite({"conditions": conditions | asdict(settings), "rows": rows})
    return finite


def heading(found: Mapping[str, Any]) -> str:
    """Return one line that states the conditions of a run."""
    c = found["conditions"]
    return (
        f"LLaMA, {c['parameters'] / 1e6:.2f}M parameters, {c['steps']} steps of "
        f"{c['batch']} x {c['length']} bytes, {_rank(c['rank'])}, seed {c['seed']}"
    )


def table(found: Mapping[str, Any]) -> Table:
    """Lay the rows out, a line a method, in the order of the run."""
    c = found["conditions"]
    title = f"{heading(found)}\n{c['corpus']}, torch {c['torch']}, CPU threads: {c['threads']}"
    shown = Table(
        title=Text(title, style="bold"),  # a str would be read as markup
        caption="Loss: mean over held-out texts. State: measured, all tensors the optimizer "
        f"keeps{_shared(found)}; saved: against AdamW. Step: optimizer.step() alone, after a "
        "discarded warm-up of the libraries; the first one also makes the state and the first "
        "subspace. Learning rates: peaks, tuned for each method, AdamW too. One seed: from seed to "
        f"seed a loss moves by some {SEED_NOISE:.2f}.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("method", no_wrap=True)
    heads = ("lr\nmatrices", "\nrest", "loss\nnats/byte", "state\nMiB", "\nsaved")
    for head in (*heads, "step ms\nmedian", "\nfirst", "\nslowest"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in found["rows"]:
        loss, saved = row["validation_loss"], row["saved"]
        shown.add_row(
            row["label"],
            _plain(row["lr"]),
            _plain(row["rest_lr"]),
            "diverged" if loss is None else f"{loss:.3f}",
            f"{row['state_mib']:.2f}",
            "-" if saved is None else f"{saved:.0%}",
            *(f"{row[key]:.1f}" for key in ("step_ms", "first_step_ms", "slowest_step_ms")),
        )
    return shown


def write(found: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write demo.json and demo.png into the folder and return their paths.

    Raises:
        CommandError: one of them cannot be written; a file of an earlier run is still there.
    """
    picture = folder / PICTURE
    numbers = write_numbers(found, folder)
    figure(found, picture)
    return numbers, picture


def write_numbers(found: Mapping[str, Any], folder: Path) -> Path:
    """Write demo.json into the folder and return its path."""
    numbers = folder / NUMBERS
    with whole_file(numbers) as beside:
        beside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return numbers


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Draw validation curves beside bars of optimizer state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, c = found["rows"], found["conditions"]
    drawing = Figure(figsize=(10, max(4.4, 0.45 * len(rows))), layout="constrained")
    FigureCanvasAgg(drawing)
    curves, bars = drawing.subplots(1, 2, width_ratios=(3, 2), gridspec_kw={"wspace": 0.08})
    _draw_curves(curves, rows, c["steps"])
    _draw_bars(bars, rows)
    drawing.suptitle(heading(found), fontsize=11, fontweight="bold")
    drawing.supxlabel(
        f"{c['corpus']}: {_size(c['train_bytes'])} to train on, "
        f"{_size(c['validation_bytes'])} held out. Learning rates of matrices and "
        f"of the rest tuned for each method. torch {c['torch']}, CPU threads: {c['threads']}.",
        fontsize=8,
        color="#555555",
        parse_math=False,
    )
    with whole_file(path) as beside:
        drawing.savefig(beside, dpi=160)


def _draw_curves(axes: Any, rows: Sequence[Mapping[str, Any]], steps: int) -> None:
    """Draw one validation curve a method, named at its right end, with the start cut off."""
    ends, early = [], []
    for row in rows:
        points = [(p["step"], p["validation"]) for p in row["curve"] if p["validation"] is not None]
        if not points:
            continue
        colour, dash = COLOURS[row["name"]], "--" if row["name"] in DASHED else "-"
        steps_at, losses = zip(*points, strict=True)
        axes.plot(steps_at, losses, dash, color=colour, lw=1.8, marker="o", ms=3.5)
        ends.append((points[-1][1], points[-1][0], row["label"], colour))
        early.append(points[min(len(points) - 1, max(1, len(points) // 4))][1])
    axes.set_xlim(0, 1.01 * steps)
    axes.set_xlabel("step")
    axes.set_title("Validation loss, nats a byte", loc="left", fontsize=10)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not ends:
        return
    low = min(end[0] for end in ends)
    high = max(low, min(CEILING, max(*early, *(end[0] for end in ends))))
    margin = 0.06 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
    ends = sorted((min(loss, high + margin), *rest) for loss, *rest in ends)
    line_height = 0.24 / axes.figure.get_figheight()  # of the axes, for 9 points
    heights = _apart([end[0] for end in ends], line_height * (high - low + 2 * margin))
    for (loss, step, label, colour), height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.7, "relpos": (0, 0.5)}
        axes.annotate(
            label,
            (step, loss),
            (1.05, height),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={**line, "shrinkA": 0, "shrinkB": 3},
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights only as far as needed to set neighbours about a gap apart."""
    moved = list(heights)
    for _ in range(200):
        for place in range(len(moved) - 1):
            lack = max(0.0, gap - (moved[place + 1] - moved[place]))
            moved[place] -= lack / 2
            moved[place + 1] += lack / 2
    return moved


def _draw_bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw optimizer state, a bar a method from the top, with its value and what it saves."""
    sizes = [row["state_mib"] for row in rows]
    colours = [COLOURS[row["name"]] for row in rows]
    drawn = axes.barh([row["label"] for row in rows], sizes, color=colours, height=0.62)
    for bar, row in zip(drawn, rows, strict=True):
        bar.set_hatch("//" if row["name"] in DASHED else None)
        bar.set_edgecolor("white")
    notes = [f"{row['state_mib']:.2f}" for row in rows]
    for place, row in enumerate(rows):
        if row["saved"] is not None:
            more = "saved" if row["saved"] >= 0 else "more"
            notes[place] += f"  ({abs(row['saved']):.0%} {more})"
    axes.bar_label(drawn, notes, padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(sizes))
    axes.set_title("Optimizer state, MiB", loc="left", fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _shared(found: Mapping[str, Any]) -> str:
    """Name what a method keeps once for all layers beside its state."""
    shares = [(row["label"], row["shared_bytes"] / MIB) for row in found["rows"]]
    notes = [f"{label}'s shared basis, {size:.2f} MiB" for label, size in shares if size >= 0.01]
    return f" ({' and '.join(notes)}, not counted)" if notes else ""


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _rank(rank: int | float) -> str:
    return f"rank {rank}" if isinstance(rank, int) else f"rank {rank:g} of the shorter axis"


def _plain(value: float) -> str:
    """Write a learning rate as 3e-3."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _finite(value: Any) -> Any:
    """Copy JSON-ready data with nan and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
