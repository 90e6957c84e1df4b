"""What sharded training costs: bytes of state and of communication, from formulas alone.

Parameters are cut along their rows over all GPUs, as FSDP2's `fully_shard` cuts them, and the
columns are projected (`side="right"`). Nothing here is measured. docs/scaling.md explains the
formulas and what they assume; its tables, between two comments, are written by this script, and so
is docs/scaling.png. `--check` writes nothing and exits with 1 where the tables are not these.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "scaling.png"
BEGIN, END = "<!-- begin: benchmarks/scaling.py -->\n", "<!-- end -->"
MIB, GIB = 2**20, 2**30
GPUS = (8, 64, 256, 1024)
SHARE = 1 / 4
"""Rank by hidden size."""
GAP = 200
"""Steps between two refreshes of svd and power: the package's default."""
BLOCK = 256
"""Values that share an 8-bit scale."""
LINK = 50e9
"""Bytes a second and direction of a nominal 400 Gb/s port, one for each GPU."""
MEMORY, LEAST = 80e9, 5e-6
"""For the figure: bytes of a GPU, and GiB where its logarithmic axis starts."""


class Shape(NamedTuple):
    """Equal parameters: rows, which are sharded, columns (1 of a vector), and how many."""

    rows: int
    cols: int
    count: int = 1
    projected: bool = True


class Model(NamedTuple):
    """A LLaMA whose output layer is not its embedding."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def shapes(self) -> list[Shape]:
        """All parameters; embedding, output layer and norms are not projected."""
        kv = self.hidden // self.heads * self.kv_heads
        return [
            Shape(self.hidden, self.hidden, 2 * self.layers),
            Shape(kv, self.hidden, 2 * self.layers),
            Shape(self.intermediate, self.hidden, 2 * self.layers),
            Shape(self.hidden, self.intermediate, self.layers),
            Shape(self.vocab, self.hidden, 2, projected=False),
            Shape(self.hidden, 1, 2 * self.layers + 1, projected=False),
        ]

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum(shape.rows * shape.cols * shape.count for shape in self.shapes)


MODELS = (
    Model("7B", 4096, 11008, 32, 32, 32, 32000),
    Model("70B", 8192, 28672, 80, 64, 8, 128256),
    Model("405B", 16384, 53248, 126, 128, 8, 128256),
)


class Method(NamedTuple):
    """What a method keeps for a matrix beside moments.

    Attributes:
        label: its name in tables.
        basis: "dense", "index" or nothing.
        learns: how the basis is found: "svd", "power", "dct", or without the gradient.
        sums: numbers that are added up over the GPUs in each step, and kept.
        counts: bytes of step numbers and flags.
    """

    label: str
    basis: str = ""
    learns: str = ""
    sums: int = 0
    counts: int = 4


METHODS = {
    "adamw": Method("AdamW"),
    "galore": Method("GaLore, svd", "dense", "svd", counts=5),
    "galore-power": Method("GaLore, power", "dense", "power", counts=5),
    "dct": Method("DCT", "index", "dct", counts=5),
    "fira": Method("Fira, power", "dense", "power", sums=1, counts=5),
    "frugal": Method("FRUGAL", "index", counts=8),
    "apollo": Method("APOLLO", sums=1),
    "dion": Method("Dion", counts=0),
}


STATES = {
    name: "GaLore, Fira" if name == "galore" else method.label
    for name, method in METHODS.items()
    if method.learns != "power"
}
"""Rows of tables of states, with their names: GaLore keeps the same with svd and with power."""


class Traffic(NamedTuple):
    """Bytes a GPU hands to all-reduces, and to collectives that cross a link once (all others)."""

    reduced: float = 0.0
    once: float = 0.0

    @property
    def payload(self) -> float:
        """All bytes handed over."""
        return self.reduced + self.once

    @property
    def link(self) -> float:
        """Bytes over the link of a GPU, each way, in a ring of many GPUs: N / (N - 1) times."""
        return 2 * self.reduced + self.once

    def plus(self, other: Traffic, factor: float) -> Traffic:
        """Return this and a multiple of another."""
        return Traffic(self.reduced + factor * other.reduced, self.once + factor * other.once)


def rank_of(name: str, model: Model, shape: Shape, share: float = SHARE) -> int:
    """Return the rank: the same for all matrices, but in Dion a share of the shorter axis."""
    axis = min(shape.rows, shape.cols) if name == "dion" else model.hidden
    return math.ceil(share * axis)


def moment_bytes(rows: int, length: int, small: bool) -> int:
    """Return two moments: float32, or a byte a value and four a block; vectors are float32."""
    if not small or length == 1:
        return 8 * rows * length
    return 2 * rows * (length + 4 * -(-length // BLOCK))


def sharded_bytes(name: str, shape: Shape, rank: int, gpus: int, small: bool) -> int:
    """Return what the GPU with the most rows keeps for its rows of one parameter.

    Dion keeps momentum and rows of Q, in float32 or bfloat16; AdamW's variance is float32 in both.
    """
    rows = -(-shape.rows // gpus)
    if name == "dion":
        size = 2 if small else 4
        return rows * (size * (shape.cols + rank) if shape.projected else shape.cols * (size + 4))
    length = rank if shape.projected and name != "adamw" else shape.cols
    return moment_bytes(rows, length, small)


def replicated_bytes(name: str, shape: Shape, rank: int, small: bool) -> int:
    """Return what every GPU keeps for one parameter: basis or indices, numbers, counts."""
    method = METHODS[name]
    if not shape.projected:
        return METHODS["adamw"].counts if method.counts else 0
    basis = {"dense": shape.cols * rank * (2 if small else 4), "index": 8 * rank, "": 0}
    return basis[method.basis] + 4 * method.sums + method.counts


def shared_bytes(name: str, model: Model, share: float = SHARE) -> int:
    """Return bases that layers share, made when needed: one for each width, on every GPU."""
    widths = {shape.cols for shape in model.shapes if shape.projected}
    each = {"dct": lambda n: 4 * n * n, "apollo": lambda n: 4 * n * math.ceil(share * model.hidden)}
    return sum(each[name](width) for width in widths) if name in each else 0


def state_bytes(name: str, model: Model, gpus: int, small: bool, share: float = SHARE) -> int:
    """Return the state on one GPU; with `gpus=0`, only what each of any number of GPUs keeps."""
    total = 0
    for shape in model.shapes:
        rank = rank_of(name, model, shape, share)
        each = replicated_bytes(name, shape, rank, small)
        total += shape.count * (
            each + (sharded_bytes(name, shape, rank, gpus, small) if gpus else 0)
        )
    return total


def refresh_traffic(name: str, cols: int, rank: int, small: bool = False) -> Traffic:
    """Return what the refresh of one matrix takes.

    svd reduces G^T G in float64 to one GPU, power sums up an image of the basis in each iteration;
    both send the basis to all, and sum up a number. DCT sums up the score of each column.
    """
    basis = cols * rank * (2 if small else 4)
    if METHODS[name].learns == "svd":
        return Traffic(4, 8 * cols * cols + basis)
    if METHODS[name].learns == "power":
        return Traffic((2 + min(8, 32 // rank)) * 4 * cols * rank + 4, basis)
    return Traffic(4 * cols) if METHODS[name].learns == "dct" else Traffic()


def update_traffic(name: str, cols: int, rank: int, small: bool = False) -> Traffic:
    """Return what one matrix takes in every step beside refreshes."""
    if name == "dion":
        return Traffic(cols * rank * (2 if small else 4) + 4 * rank)
    return Traffic(4 * METHODS[name].sums)


def step_traffic(name: str, model: Model, all_at_once: bool = False) -> Traffic:
    """Return what a step takes on the average, or one in which all matrices are refreshed."""
    total = Traffic()
    gap = 1 if all_at_once or METHODS[name].learns == "dct" else GAP
    for shape in model.shapes:
        if shape.projected:
            rank = rank_of(name, model, shape)
            total = total.plus(update_traffic(name, shape.cols, rank), shape.count)
            total = total.plus(refresh_traffic(name, shape.cols, rank), shape.count / gap)
    return total


def gathered(model: Model) -> Traffic:
    """Return what it takes to gather the bf16 gradient of each matrix in every step."""
    matrices = (shape for shape in model.shapes if shape.projected)
    return Traffic(0, sum(2 * shape.rows * shape.cols * shape.count for shape in matrices))


def fsdp(model: Model) -> Traffic:
    """Return FSDP2's own: parameters gathered twice and gradients reduced once, all in bf16."""
    return Traffic(0, 6 * model.parameters)


def first_above(name: str, model: Model, share: float, small: bool) -> int:
    """Return the least number of GPUs on which a method, shared bases too, takes more than AdamW.

    Of methods that keep something on every GPU, for the search to end.
    """
    shared, gpus = shared_bytes(name, model, share), 1
    while shared + state_bytes(name, model, gpus, small, share) <= state_bytes(
        "adamw", model, gpus, small
    ):
        gpus += 1
    return gpus


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
    heads = ["model", "parameters", "projected", "matrices", "rank", "Dion's rank of K, V"]
    rows = []
    for model in MODELS:
        matrices = [shape for shape in model.shapes if shape.projected]
        inside = sum(shape.rows * shape.cols * shape.count for shape in matrices)
        share = f"{100 * inside / model.parameters:.1f} %"
        count = sum(shape.count for shape in matrices)
        ranks = [f"{rank_of(name, model, matrices[1]):,}" for name in ("galore", "dion")]
        rows.append([model.name, f"{model.parameters:,}", share, str(count), *ranks])
    return table(heads, rows)


def floor_table() -> str:
    """Lay out what every GPU holds, however many there are."""
    names = ("state of GaLore, Fira", "state of DCT, FRUGAL", "state of APOLLO", "shared by DCT")
    rows = []
    for model in MODELS:
        widest = max(shape.cols for shape in model.shapes)
        kept = [both(name, model, 0) for name in ("galore", "dct", "apollo")]
        shared = [digits(shared_bytes(name, model) / GIB) for name in ("dct", "apollo")]
        rows.append([model.name, *kept, *shared, digits(8 * widest**2 / GIB)])
    return table(["model", *names, "shared by APOLLO", "G^T G of svd"], rows)


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

    colours = COLOURS | {"galore-power": COLOURS["galore"], "dion": "#56B4E9"}
    drawing = Figure(figsize=(11, 7.6), layout="constrained")
    FigureCanvasAgg(drawing)
    above, below = drawing.subplots(2, 3, height_ratios=(3, 2), sharey="row")
    for model, upper, lower in zip(MODELS, above, below, strict=True):
        draw_state(upper, model, colours)
        draw_steps(lower, model, colours)
    below[0].invert_yaxis()
    above[0].set_ylabel("GiB on each GPU, float32")
    drawing.legend(
        *above[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False
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
        axes.loglog(GPUS, sizes, "o-", ms=4, lw=1.8, color=colours[name], label=label)
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
    for place, (colour, (_, mean, _)) in enumerate(zip(filled, found, strict=True)):
        size = mean.link / GIB
        at = max(size, LEAST)
        axes.plot(at, place, "o", ms=6, color=colour, visible=size > 0)
        axes.annotate(digits(size), (at, place), (7 if size else 0, 0), va="center", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(found)), [label for label, _, _ in found])
    axes.set_xscale("log")
    axes.set_xlim(LEAST / 2, 1e5)
    axes.set_xticks([1e-3, 1, 1e3], ["0.001", "1", "1000 GiB"])
    axes.set_title(f"{model.name}: over a link in a step", loc="left", fontsize=10)
    finish(axes)


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
