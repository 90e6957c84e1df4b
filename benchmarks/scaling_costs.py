"""What sharded training costs, as formulas: bytes of state, and of communication.

Parameters are cut along their rows over all GPUs, as FSDP2's `fully_shard` cuts them, and the
columns are projected (`side="right"`). docs/scaling.md explains the formulas and what they assume,
`scaling.py` writes its tables.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SHARE = 1 / 4
"""Rank by hidden size."""
GAP = 200
"""Steps between two refreshes of svd and power: the package's default."""
BLOCK = 256
"""Values that share an 8-bit scale."""


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
        basis: "dense", "cut" (dense, but each GPU keeps a part), "index" or nothing.
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
    "galore-cut": Method("GaLore, power, bases cut", "cut", "power", counts=5),
    "dct": Method("DCT", "index", "dct", counts=5),
    "fira": Method("Fira, power", "dense", "power", sums=1, counts=5),
    "frugal": Method("FRUGAL", "index", counts=8),
    "apollo": Method("APOLLO", sums=1),
    "dion": Method("Dion", counts=0),
}

ALIKE = {"galore": "GaLore, Fira", "galore-cut": "GaLore, Fira, bases cut"}
"""Methods that stand for others in tables of states: svd and power keep the same."""
STATES = {
    name: ALIKE.get(name, method.label)
    for name, method in METHODS.items()
    if name in ALIKE or method.learns != "power"
}
"""Rows of tables of states, with their names."""


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
    """Return the rank: the same for all matrices, but a learnt basis has no more than rows.

    In Dion it is a share of the shorter axis.
    """
    if name == "dion":
        return math.ceil(share * min(shape.rows, shape.cols))
    rank = math.ceil(share * model.hidden)
    return min(rank, shape.rows) if METHODS[name].basis in ("dense", "cut") else rank


def basis_bytes(cols: int, rank: int, small: bool) -> int:
    """Return what a dense basis takes, in float32 or bfloat16, or some rows of one."""
    return cols * rank * (2 if small else 4)


def moment_bytes(rows: int, length: int, small: bool) -> int:
    """Return two moments: float32, or a byte a value and four a block; vectors are float32."""
    if not small or length == 1:
        return 8 * rows * length
    return 2 * rows * (length + 4 * -(-length // BLOCK))


def sharded_bytes(name: str, shape: Shape, rank: int, gpus: int, small: bool) -> int:
    """Return what the GPU with the most rows keeps of what is cut, for one parameter.

    It has the most rows of a basis that is cut, too. Dion keeps momentum and rows of Q, in float32
    or bfloat16; AdamW's variance is float32 in both.
    """
    rows = -(-shape.rows // gpus)
    if name == "dion":
        size = 2 if small else 4
        return rows * (size * (shape.cols + rank) if shape.projected else shape.cols * (size + 4))
    length = rank if shape.projected and name != "adamw" else shape.cols
    moments = moment_bytes(rows, length, small)
    if shape.projected and METHODS[name].basis == "cut":
        return moments + basis_bytes(-(-shape.cols // gpus), rank, small)
    return moments


def replicated_bytes(name: str, shape: Shape, rank: int, small: bool) -> int:
    """Return what every GPU keeps for one parameter: basis or indices, numbers, counts."""
    method = METHODS[name]
    if not shape.projected:
        return METHODS["adamw"].counts if method.counts else 0
    basis = {"dense": basis_bytes(shape.cols, rank, small), "index": 8 * rank}
    return basis.get(method.basis, 0) + 4 * method.sums + method.counts


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
    both send the basis to all, and sum up a number; one that is cut is put together before. DCT
    sums up the score of each column.
    """
    basis = basis_bytes(cols, rank, small)
    sent = 2 * basis if METHODS[name].basis == "cut" else basis
    if METHODS[name].learns == "svd":
        return Traffic(4, 8 * cols * cols + sent)
    if METHODS[name].learns == "power":
        return Traffic((2 + min(8, 32 // rank)) * 4 * cols * rank + 4, sent)
    return Traffic(4 * cols) if METHODS[name].learns == "dct" else Traffic()


def update_traffic(name: str, cols: int, rank: int, small: bool = False) -> Traffic:
    """Return what one matrix takes in every step beside refreshes: a basis that is cut, to use it.

    Dion sums up its low-rank factor, of the size of a basis.
    """
    basis = basis_bytes(cols, rank, small)
    if name == "dion":
        return Traffic(basis + 4 * rank)
    return Traffic(4 * METHODS[name].sums, basis if METHODS[name].basis == "cut" else 0)


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
