"""What sharded training costs: the tables and the figure of docs/scaling.md, from formulas alone.

The formulas are in `scaling_costs.py`; nothing is measured. The tables, between two comments of the
document, are written by this script, and so is docs/scaling.png. `--check` writes nothing and exits
with 1 where the tables are not these.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from scaling_costs import (
    GAP,
    METHODS,
    MODELS,
    STATES,
    Model,
    Traffic,
    first_above,
    fsdp,
    gathered,
    rank_of,
    shared_bytes,
    state_bytes,
    step_traffic,
)

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "scaling.png"
BEGIN, END = "<!-- begin: benchmarks/scaling.py -->\n", "<!-- end -->"
MIB, GIB = 2**20, 2**30
GPUS = (8, 64, 256, 1024)
LINK = 50e9
"""Bytes a second and direction of a nominal 400 Gb/s port, one for each GPU."""
MEMORY, LEAST = 80e9, 5e-6
"""For the figure: bytes of a GPU, and GiB where its logarithmic axis starts."""


def digits(value: float) -> str:
    """Write three digits, or three places where that is less."""
    if 0 < value < 0.0005:
        return "<0.001"
    places = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{max(0, min(places, 3))}f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Lay out a table whose first column holds names."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def both(name: str, model: Model, gpus: int) -> str:
    """Write GiB of states in float32 and in 8 bits."""
    return " / ".join(digits(state_bytes(name, model, gpus, small) / GIB) for small in (0, 1))


def model_table() -> str:
    """Lay out what the models are."""
    heads = ["model", "parameters", "projected", "matrices"]
    heads += ["rank", "of K, V in GaLore, Fira", "of K, V in Dion"]
    rows = []
    for model in MODELS:
        matrices = [shape for shape in model.shapes if shape.projected]
        inside = sum(shape.rows * shape.cols * shape.count for shape in matrices)
        share = f"{100 * inside / model.parameters:.1f} %"
        count = sum(shape.count for shape in matrices)
        ranks = [f"{rank_of(name, model, matrices[1]):,}" for name in ("dct", "galore", "dion")]
        rows.append([model.name, f"{model.parameters:,}", share, str(count), *ranks])
    return table(heads, rows)


def floor_table() -> str:
    """Lay out what every GPU holds, however many there are."""
    columns = {name: STATES[name] for name in ("galore", "galore-cut")}
    columns |= {"dct": "DCT, FRUGAL", "apollo": "APOLLO"}
    rows = []
    for model in MODELS:
        widest = max(shape.cols for shape in model.shapes)
        kept = [both(name, model, 0) for name in columns]
        shared = [digits(shared_bytes(name, model) / GIB) for name in ("dct", "apollo")]
        rows.append([model.name, *kept, *shared, digits(8 * widest**2 / GIB)])
    names = [f"state of {label}" for label in columns.values()]
    return table(["model", *names, "shared by DCT", "shared by APOLLO", "G^T G of svd"], rows)


def crossing_table() -> str:
    """Lay out from how many GPUs on a method takes more than AdamW on each."""
    cases = [*(("galore", part) for part in (4, 8, 16, 32)), ("dct", 4), ("apollo", 4)]
    rows = []
    for model in MODELS:
        found = [
            [str(first_above(name, model, 1 / part, small)) for small in (False, True)]
            for name, part in cases
        ]
        rows.append([model.name, *map(" / ".join, found)])
    return table(["model", *(f"{STATES[name]}, 1/{part}" for name, part in cases)], rows)


def state_table(model: Model) -> str:
    """Lay out the state of each method by the number of GPUs."""
    rows = [[label, *(both(name, model, gpus) for gpus in GPUS)] for name, label in STATES.items()]
    return table([model.name, *(f"{gpus} GPUs" for gpus in GPUS)], rows)


def steps_of(model: Model) -> list[tuple[str, Traffic, Traffic]]:
    """Return what steps take, by name: on the average, and where all matrices are refreshed."""
    found = [
        (method.label, step_traffic(name, model), step_traffic(name, model, all_at_once=True))
        for name, method in METHODS.items()
    ]
    fixed = {"gradients gathered": gathered(model), "FSDP2 itself": fsdp(model)}
    return [*found, *((label, traffic, traffic) for label, traffic in fixed.items())]


def step_table(model: Model) -> str:
    """Lay out what each method hands to collectives in a step, and what that means for a link."""
    heads = [model.name, "MiB a step", "GiB, all refreshed", "of FSDP2's on a link", "ms, at least"]
    rows = []
    for label, mean, most in steps_of(model):
        share = f"{digits(100 * mean.link / fsdp(model).link)} %"
        sizes = [digits(mean.payload / MIB), digits(most.payload / GIB)]
        rows.append([label, *sizes, share, digits(1000 * mean.link / LINK)])
    return table(heads, rows)


def tables() -> str:
    """Return all tables with their headings."""
    parts = [
        "### Models\n\n" + model_table(),
        "### State on each GPU, GiB\n",
        "In float32 / in 8 bits, bfloat16 in Dion. Bases that layers share come on top.\n",
        *map(state_table, MODELS),
        "### On every GPU, however many there are, GiB\n",
        "State in float32 / in 8 bits.\n",
        floor_table(),
        "### GPUs from which on a method takes more than AdamW on each\n",
        "With bases that layers share, by rank as a share of the hidden size; float32 / 8 bits.\n",
        crossing_table(),
        "### Communication of a step\n",
        *map(step_table, MODELS),
    ]
    return "\n".join(parts)


def written(text: str) -> str:
    """Return the document with the tables as they are to be."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def figure(path: Path) -> None:
    """Draw memory by the number of GPUs above, and what crosses a link in a step below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lowrank_optim.demo.report import COLOURS

    colours = COLOURS | dict.fromkeys(("galore-power", "galore-cut"), COLOURS["galore"])
    colours["dion"] = "#56B4E9"
    drawing = Figure(figsize=(11, 7.6), layout="constrained")
    FigureCanvasAgg(drawing)
    above, below = drawing.subplots(2, 3, height_ratios=(3, 2), sharey="row")
    for model, upper, lower in zip(MODELS, above, below, strict=True):
        draw_state(upper, model, colours)
        draw_steps(lower, model, colours)
    below[0].invert_yaxis()
    above[0].set_ylabel("GiB on each GPU, float32")
    drawing.legend(
        *above[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False
    )
    drawing.supxlabel(
        "Computed, not measured. Rows sharded over all GPUs; rank: a quarter of the hidden size; "
        f"svd and power refresh every {GAP} steps, DCT in each.",
        fontsize=8,
        color="#555555",
    )
    drawing.savefig(path, dpi=160)


def draw_state(axes: Any, model: Model, colours: dict[str, str]) -> None:
    """Draw a line a method, with the bases that layers share."""
    for name, label in STATES.items():
        sizes = [state_bytes(name, model, gpus, False) for gpus in GPUS]
        sizes = [(size + shared_bytes(name, model)) / GIB for size in sizes]
        axes.loglog(GPUS, sizes, lw=1.8, label=label, color=colours[name], **marks(name, 4))
    axes.axhline(MEMORY / GIB, color="#999999", lw=0.8, ls=":")
    axes.text(GPUS[-1], 1.07 * MEMORY / GIB, "80 GB", ha="right", fontsize=8, color="#777777")
    axes.set_xticks(GPUS, GPUS)
    axes.set_xlabel("GPUs")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{model.name}: state and shared bases", loc="left", fontsize=10)
    finish(axes)


def draw_steps(axes: Any, model: Model, colours: dict[str, str]) -> None:
    """Draw a dot for what each method sends over a link in a step, on the average."""
    found = steps_of(model)
    filled = [*(colours[name] for name in METHODS), "#777777", "#bbbbbb"]
    names = [*METHODS, "", ""]
    for place, (name, colour, (_, mean, _)) in enumerate(zip(names, filled, found, strict=True)):
        size = mean.link / GIB
        at = max(size, LEAST)
        axes.plot(at, place, color=colour, visible=size > 0, **marks(name, 6))
        axes.annotate(digits(size), (at, place), (7 if size else 0, 0), va="center", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(found)), [label for label, _, _ in found])
    axes.set_xscale("log")
    axes.set_xlim(LEAST / 2, 1e5)
    axes.set_xticks([1e-3, 1, 1e3], ["0.001", "1", "1000 GiB"])
    axes.set_title(f"{model.name}: over a link in a step", loc="left", fontsize=10)
    finish(axes)


def marks(name: str, size: float) -> dict[str, Any]:
    """Return how dots and lines look: hollow and dashed where bases are cut."""
    look = {"marker": "o", "ms": size}
    return look | ({"ls": (0, (3, 1.5)), "mfc": "white"} if name == "galore-cut" else {})


def finish(axes: Any) -> None:
    """Take away what does not help to read a plot."""
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    """Write tables and figure, or compare the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare the tables")
    parser.add_argument("--doc", type=Path, default=DOC)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args(arguments)
    text = args.doc.read_text()
    wanted = written(text)
    if args.check:
        print(f"{args.doc.name}: {'up to date' if text == wanted else 'not what the script makes'}")
        return int(text != wanted)
    args.doc.write_text(wanted)
    figure(args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
