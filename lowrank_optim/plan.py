"""The types that everything else is written against: Plan, Site, Update and four protocols.

Shapes throughout: a matrix is seen through a view in which the projected axis is last, so `grad`
is `(..., rows, cols)` and the projected gradient `low` is `(..., rows, rank)`; the leading `...`
is empty for a matrix and `(E,)` for a stack of E matrices, which are projected one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed import Each, Layout
from .functional import Norms, Want
from .team import Team

State = MutableMapping[str, Any]
Group = Mapping[str, Any]
Moments = dict[str, Tensor]


class Shared:
    """Tensors that parameters of one optimizer share: derived from numbers, never saved.

    What one step did not ask for is dropped by `sweep` and made again when asked for.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}
        self._asked: set[Any] = set()

    def get(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor for `key`, made once."""
        self._asked.add(key)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def sweep(self) -> None:
        """Drop what was not asked for since the last sweep."""
        self._kept = {key: kept for key, kept in self._kept.items() if key in self._asked}
        self._asked.clear()

    def tensors(self) -> list[Tensor]:
        """Return every tensor held now."""
        return list(self._kept.values())


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
        share: the rank as a share of `cols` where it was given so (FRUGAL's density).
        shared: tensors common to several parameters.
        kernels: whether kernels may be used, where there are any for the dtype.
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
    shared: Shared = field(default_factory=Shared)
    kernels: bool = False
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
        low: given where the gradient was projected before, in a subspace that has moved already:
            then `grad` is no more than the last part of it.
    """

    param: Tensor
    grad: Tensor
    state: State
    site: Site | None
    position: int
    layout: Layout
    leaf: Tensor
    low: Tensor | None = None


class Matrix(NamedTuple):
    """What a projector works on: a gradient with the projected axis last, state and place."""

    grad: Tensor
    state: State
    site: Site


class Projector(Protocol):
    """Maps `(..., rows, cols)` to `(..., rows, rank)` and back: P has orthonormal columns.

    `on_refresh` lists what can be done with the moments when the subspace moves; `keys` are the
    names this projector owns in a parameter's state, `common` those of them that a stack has once
    for all of its matrices, `bases` those that are `(..., cols, rank)`; `learns` says that the
    subspace comes from the gradient, and `decomposes` that this takes a decomposition, whose bits
    may differ from machine to machine: then all processes take that of one; `whole` says that it
    takes a matrix whole or not at all instead of a part of every row; `captures` says what of it a
    CUDA graph may hold: "refresh" all, "step" the steps between refreshes, "" nothing, because a
    refresh makes tensors at other addresses.
    """

    keys: ClassVar[tuple[str, ...]]
    common: ClassVar[tuple[str, ...]]
    bases: ClassVar[tuple[str, ...]]
    on_refresh: ClassVar[tuple[str, ...]]
    learns: ClassVar[bool]
    decomposes: ClassVar[bool]
    whole: ClassVar[bool]
    captures: ClassVar[str]

    def width(self, site: Site) -> int:
        """Return the number of columns of `low`: the rank, or 0 while the matrix sits out."""

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return the state before the first refresh: a valid subspace that knows no gradient."""

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Move the subspaces of matrices of one shape, dtype and device, in place.

        A subspace that comes from the gradient stays as it is where that has a value that is not
        finite or is all zero. Where rows are shared out, what is learnt is summed over the `team`
        of the sites, one for all matrices. Where the projector `decomposes`, it is enough that the
        process which `team.owns` a matrix's place knows the result. Nothing here may wait for the
        device.
        """

    def factor(self, state: State, site: Site) -> Tensor:
        """Return P, `(..., cols, rank)`, or `(rank,)` integers: P is a choice of columns."""

    def transport(
        self, rule: Rule, moments: Moments, before: State, state: State, site: Site, group: Group
    ) -> None:
        """Carry the moments from the subspace `before` into that of `state`, in place."""

    def align(self, before: State, state: State) -> None:
        """Turn the new basis inside its own span towards the old one, in place."""


class Rule(Protocol):
    """What turns gradients into a direction: Adam, Lion, momentum. It knows no lr and no decay.

    `slots` are its moments; those in `squares` are averages of squares and never negative.
    """

    slots: ClassVar[tuple[str, ...]]
    squares: ClassVar[tuple[str, ...]]

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moments in place with the `count`-th gradient and return the direction."""

    def rotate(self, moments: Moments, rotation: Tensor, count: int, group: Group) -> None:
        """Carry moments of `count` gradients by `P_old^T P_new` `(..., rank, rank)`, in place."""

    def uncorrected(self, count: int | Tensor, group: Group) -> float | Tensor:
        """Return the factor from the direction to the one without bias correction."""

    def counts_on_device(self, param: Tensor, moments: torch.dtype, group: Group) -> bool:
        """Return whether `step_plain` wants the step count of this parameter on its device."""

    def step_plain(self, jobs: list[Job], group: Group) -> list[Job]:
        """Do whole steps of parameters that are not projected; return those it leaves undone."""


class Residual(Protocol):
    """What happens to the part of the gradient that the projection drops.

    `want` says which results of `functional.project_moments` it and its update need; `keys` are
    the names of its state, one number a matrix each.
    """

    @property
    def want(self) -> Want:
        """What has to be computed."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its state."""

    def init(self, batch: tuple[int, ...], site: Site) -> State:
        """Return its state for one parameter: tensors of shape `batch`."""

    def sums(self, norms: Norms | None, rank: int, group: Group) -> Tensor | None:
        """Return what the update needs summed over all rows of each matrix, `(..., k)`, or None."""

    def update(
        self,
        norms: Norms | None,
        sums: Tensor | None,
        state: State,
        rank: int,
        group: Group,
        uncorrected: float | Tensor,
    ) -> Update:
        """Return the factors of the update, from row norms and `sums`; state in place."""


class Storage(Protocol):
    """How moments are made; how one lies in memory can be seen from the state."""

    def dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype of a dense moment of a parameter, and of a basis."""

    def zeros(self, slot: str, shape: tuple[int, ...], like: Tensor, size: int = 0) -> State:
        """Return the entries of a zero moment on the device of `like`.

        Args:
            slot: name of the moment.
            shape: of the moment.
            like: the parameter, or what is held of it.
            size: elements of the parameter, if it is not projected: the moment is like it.
        """


@dataclass(frozen=True)
class Plan:
    """The structure of one group's update; a pairing that makes no sense is refused here."""

    rule: Rule
    projector: Projector
    residual: Residual
    storage: Storage
    side: str
    on_refresh: str

    def each(self, group: Group) -> Each:
        """Return what the entries of a state are kept for."""
        cut = self.projector.bases if group["shard_basis"] else ()
        return Each(self.rule.slots, self.projector.common, cut)

    def __post_init__(self) -> None:
        name = type(self.projector).__name__
        if self.on_refresh not in self.projector.on_refresh:
            raise ValueError(
                f"on_refresh={self.on_refresh!r} does not go with the projector {name}: "
                f"choose one of {', '.join(map(repr, self.projector.on_refresh))}"
            )
        if self.residual.want.norms and self.projector.whole:
            raise ValueError(
                f"the residual {type(self.residual).__name__} does not go with the projector "
                f"{name}: a matrix that sits out has no projected gradient to compare norms "
                "with; choose Drop or StateFree"
            )
