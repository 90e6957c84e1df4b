"""Plans as a table, as JSON and as a figure."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..terminal import printable, whole_file
from .cards import GIB, RESERVE
from .estimate import Estimate, Plans
from .phases import Parts

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PARTS = [field.name for field in fields(Parts)]
ACROSS = 9
"""Methods side by side in a table of 100 columns."""

# Okabe and Ito's palette, told apart under every common colour blindness.
COLOURS = {
    "weights": "#0072B2",
    "gradients": "#D55E00",
    "state": "#009E73",
    "basis": "#F0E442",
    "workspace": "#CC79A7",
    "activations": "#56B4E9",
}


def heading(plans: Plans) -> str:
    """Return the model and how it is trained, in one line."""
    s = plans.settings
    state = s["state_dtype"] or "float32"
    said = [
        f"{printable(plans.model)}, {plans.parameters / 1e9:.3g}B parameters in {s['dtype']}",
        f"batch {s['batch']} x {s['seq']} tokens",
        f"rank {s['rank']}",
        f"{state.replace('8bit', '8-bit')} states",
        *(["layer-wise"] if s["layerwise"] else []),
        *(["checkpointing"] if s["checkpointing"] else []),
    ]
    return ", ".join(said)


def notes(plans: Plans) -> str:
    """Return what a reader of the numbers has to know."""
    said = (
        "GiB at the moment of the largest total, which is in the backward pass or in the "
        "optimizer's step. Counted on tensors without values, not measured on a GPU."
    )
    if plans.settings["layerwise"] and any(not row.layerwise for row in plans.rows):
        said += " Layer-wise: our methods; the others step after the backward pass."
    if plans.card is not None:
        said += (
            f" {plans.card.name}: {plans.card.total / GIB:.1f} GiB, of which "
            f"{RESERVE / GIB:g} GiB is left to CUDA's context and to holes between tensors."
        )
    return said


def table(plans: Plans) -> Group:
    """Lay out the parts, a column a method; more than `ACROSS` methods go on below."""
    from rich.console import Group
    from rich.text import Text

    starts = range(0, len(plans.rows), ACROSS)
    tables = [_block(plans, plans.rows[start : start + ACROSS]) for start in starts]
    tables[0].title = Text(_broken(heading(plans)), style="bold")  # a str would be read as markup
    tables[-1].caption = notes(plans)
    return Group(*tables)


def _block(plans: Plans, rows: list[Estimate]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        min_width=60,
    )
    shown.add_column("GiB", no_wrap=True)
    for row in rows:
        shown.add_column(row.label, justify="right", no_wrap=True)
    last = PARTS[-1]
    for part in PARTS:
        cells = [f"{getattr(row.parts, part) / GIB:.2f}" for row in rows]
        shown.add_row(part, *cells, end_section=part == last)
    shown.add_row("total", *(f"{row.total / GIB:.2f}" for row in rows), style="bold")
    for phase, label in (("backward", "in backward"), ("step", "in the step")):
        shown.add_row(label, *(f"{row.phases[phase].total / GIB:.2f}" for row in rows))
    shown.add_section()
    if plans.card is not None:
        usable = f"in {plans.card.usable / GIB:.2f}"
        shown.add_row(usable, *("fits" if row.fits else "no" for row in rows), style="bold")
        shown.add_row("spare", *(f"{(row.spare or 0) / GIB:.2f}" for row in rows))
        shown.add_row("largest rank", *(_number(row.largest_rank) for row in rows))
        shown.add_row("largest batch", *(_number(row.largest_batch) for row in rows))
    return shown


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def as_json(plans: Plans) -> str:
    """Return everything, in bytes."""
    return json.dumps(plans.as_dict(), indent=1)


def figure(plans: Plans, path: Path) -> None:
    """Draw a bar a method, stacked from its parts, with the card's line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(max(9, 1.05 * len(plans.rows)), 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    names = [row.label for row in plans.rows]
    bottom = [0.0] * len(names)
    for part in PARTS:
        sizes = [getattr(row.parts, part) / GIB for row in plans.rows]
        axes.bar(
            names, sizes, bottom=bottom, color=COLOURS[part], label=part, width=0.66,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    top, below = max(bottom), False
    for place, row in enumerate(plans.rows):
        axes.annotate(
            f"{row.total / GIB:.1f}", (place, bottom[place]), (0, 3), textcoords="offset points",
            ha="center", fontsize=10, fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8}, zorder=3,
        )  # fmt: skip
    if plans.card is not None:
        line = plans.card.usable / GIB
        top = max(top, line)
        axes.axhline(line, color="#222222", lw=1.2, ls="--")
        axes.annotate(
            f"{plans.card.name}:\n{line:.1f} GiB usable", (1, line), (6, 0), va="center",
            xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=9,
            annotation_clip=False,
        )  # fmt: skip
        below = line > 0.5 * top
    axes.set_ylim(0, 1.12 * top)
    axes.set_ylabel("GiB at the peak")
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], frameon=False, fontsize=9,
        loc="lower left" if below else "upper left", bbox_to_anchor=(1, 0 if below else 1),
    )  # fmt: skip
    axes.set_title(_broken(heading(plans)), fontsize=11, fontweight="bold", parse_math=False)
    with whole_file(path) as beside:
        drawing.savefig(beside, dpi=160)


def _broken(text: str) -> str:
    """Return a text in two lines, broken at the comma nearest to its middle."""
    commas = [place for place in range(len(text)) if text.startswith(", ", place)]
    middle = min(commas, key=lambda place: abs(place - len(text) // 2))
    return f"{text[: middle + 1]}\n{text[middle + 2 :]}"
