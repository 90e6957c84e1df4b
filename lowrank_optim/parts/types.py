"""The types that everything else is written against: Site, Update, Job, Matrix.

Shapes throughout: a matrix is seen through a view in which the projected axis is last, so `grad`
is `(..., rows, cols)` and the projected gradient `low` is `(..., rows, rank)`; the leading `...`
is empty for a matrix and `(E,)` for a stack of E matrices, which are projected one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..functional import Noise, Stored, stream_of
from ..sharding.collectives import Team
from ..sharding.layout import Layout
from .kinds import COUNT, FLAG, Kind

Moments = dict[str, Tensor]


State = MutableMapping[str, Any]


Group = Mapping[str, Any]


class Shared:
    """Tensors that parameters of one optimizer share: derived from numbers, never saved.

    `sweep` drops what one step did not ask for; it is made again when it is asked for.
    """

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}
        self._asked: set[Any] = set()

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor for `key`, made once."""
        self._asked.add(key)
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def sweep(self) -> None:
        """Drop what was not asked for since the last sweep."""
        self.kept = {key: kept for key, kept in self.kept.items() if key in self._asked}
        self._asked.clear()

    def tensors(self) -> list[Tensor]:
        """Return every tensor held now."""
        return list(self.kept.values())


@dataclass(slots=True)
class Site:
    """What a projector knows of the matrix it works on, apart from its gradient and state.

    Attributes:
        rank: width of the subspace.
        cols: length of the projected axis.
        dtype: dtype of the arithmetic: float32, or float64 for float64 parameters.
        device: device of the parameter.
        seed: the optimizer's seed; with `step` it fixes every random draw.
        step: updates of this parameter before this one.
        gap: updates between refreshes.
        turn, turns: place of this matrix among the projected ones of its group, and their number.
        share: the rank as a share of `cols` if it was given as one (FRUGAL's density).
        most: the largest rank, where it is chosen anew at each refresh.
        phase: by how many updates its refreshes come later than without staggering.
        shared: tensors common to several parameters.
        launches: whether launches of kernels do the step.
        ops: the module that codes moments, draws bits and scores columns: kernels or `functional`.
        prepared_for: dtype and class of the gradient for which `launches` and `ops` were found.
        wanted: `(..., 1, 1)` booleans, which matrices of a stack a refresh is for; None for all.
        layout: which rows of the parameter this process holds, and how they are seen.
    """

    rank: int
    cols: int
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    step: int = 0
    gap: int = 1
    turn: int = 0
    turns: int = 1
    share: float | None = None
    most: int | None = None
    phase: int = 0
    shared: Shared = field(default_factory=Shared)
    launches: bool = False
    ops: ModuleType = functional
    prepared_for: Any = None
    wanted: Tensor | None = None
    layout: Layout = field(default_factory=lambda: Layout(()))

    @property
    def team(self) -> Team:
        """The processes that hold other rows of the same matrices."""
        return self.layout.team


@dataclass(frozen=True)
class Update:
    """What a step adds to a weight, as four small factors; no matrix is formed.

    update = (direction * N + low * R) P^T + grad * G + sign * sgn(G - R P^T)
    with G the gradient, R = G P its projection and N the rule's direction on R. The weight moves by
    `-lr * update`.

    Attributes:
        direction: a number.
        low: a number, or one a row, `(..., rows, 1)`.
        grad: likewise.
        sign: a number.
    """

    direction: float = 0.0
    low: Tensor | float = 0.0
    grad: Tensor | float = 0.0
    sign: float = 0.0


class Job(NamedTuple):
    """One parameter that has a gradient, as far as this process holds it.

    Attributes:
        param: what is written.
        grad: its gradient.
        state: its state.
        site: None where it is not projected.
        position: place of the parameter in the optimizer, from 1.
        layout: which part of the parameter this is.
        leaf: the parameter itself, as the optimizer knows it.
        low: the projected gradient, if it was accumulated before in a subspace that has moved
            already; `grad` is then only the last part of it.
        kept: what a feed stores at the end, if `grad` is what the feed made of it, see `Fed`.
        sampled: sum of squares of Adam's directions on the entries of the sample that lie here, one
            number a matrix, where the length of the update is measured so.
    """

    param: Tensor
    grad: Tensor
    state: State
    site: Site | None
    position: int
    layout: Layout
    leaf: Tensor
    low: Tensor | None = None
    kept: Moments | None = None
    sampled: Tensor | None = None


def site_of(job: Job) -> Site:
    """Return the site of a projected parameter."""
    assert job.site is not None
    return job.site


class Matrix(NamedTuple):
    """What a projector works on: a gradient with the projected axis last, state and place."""

    grad: Tensor
    state: State
    site: Site


COUNTED: dict[str, Kind] = {"step": COUNT, "age": COUNT, "pending": FLAG, "unset": FLAG}
"""Kinds of entries that no part of a plan owns: counts, and flags of matrices that still wait."""


Rates = tuple[float | Tensor, float | Tensor]
"""Step size and decay, see `rates_of`."""


def rates_of(group: Group) -> Rates:
    """Return the step size, with its sign, and the decay: numbers, or 0-d tensors on a device."""
    lr: float | Tensor = group["lr"]
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type == "cpu" else lr.reshape(())
    return lr if group["maximize"] else -lr, 1 - lr * group["weight_decay"]


def age_of(job: Job, group: Group) -> int | Tensor:
    """Return the number of gradients in the moments, this one included."""
    age: Tensor = job.state["age" if "age" in job.state else "step"]
    return age if group["capturable"] else int(age)


def noise_of(job: Job, group: Group) -> Noise:
    """Return the source of random bits of one parameter's step."""
    step: Tensor = job.state["step"]
    count = step if group["capturable"] else int(step)
    return Noise(group["seed"], count, *stream_and_height(job))


def stream_and_height(job: Job) -> tuple[int, int | None]:
    """Return stream and height of a source of random bits for the held part of a parameter."""
    layout = job.layout
    return stream_of(job.position, layout.first_row), None if job.site is None else layout.rows


def in_rows(x: Tensor) -> Tensor:
    """Return a vector, or a number, as a column: its rows are what processes share out."""
    return x.view(-1, 1) if x.ndim < 2 else x


def moment_in_rows(moment: Stored) -> Stored:
    """Return the moment of a vector as a column; vectors have no moments in 8 bits."""
    return in_rows(moment) if isinstance(moment, Tensor) else moment


def rounds(param: Tensor, group: Group) -> bool:
    """Return whether the weight is rounded stochastically."""
    return group["stochastic_rounding"] and param.dtype == torch.bfloat16


ONE = torch.ones((), device="cpu")
"""A list of CPU tensors is stepped one by one, and would make a tensor of a number for each."""


def count(jobs: list[Job]) -> None:
    """Count the update of some parameters."""
    counts = [job.state[key] for job in jobs for key in ("step", "age") if key in job.state]
    here = [step for step in counts if step.is_cpu]
    if here:
        torch._foreach_add_(here, ONE, alpha=1)
    if len(here) < len(counts):
        torch._foreach_add_([step for step in counts if not step.is_cpu], 1)
