"""The parts of a plan, as protocols: feed, projector, rule, residual, storage. For lengths see
`length.py`.

A feed, projector, rule or residual may declare the numbers that it reads from its group, in
`numbers`: a `ClassVar` of `Number` by group key, see `numbers.py`. It is optional, and so stands in
no protocol: a part without it reads no numbers. Shapes are as in `types.py`: `grad` is
`(..., rows, cols)` with the projected axis last, `low` is `(..., rows, rank)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..functional import Factor, Norms, Want
from .kinds import Kind
from .types import Group, Job, Matrix, Moments, Site, State, Update


class Carried(NamedTuple):
    """The moments of the step before, and the number of gradients in them.

    Attributes:
        moment: gives a moment `(..., rows, rank)` by its slot, in the dtype of the arithmetic.
        lift: turns what is in the subspace into `(..., rows, cols)`.
        seen: number of gradients in them.
    """

    moment: Callable[[str], Tensor]
    lift: Callable[[Tensor], Tensor]
    seen: int


class Projector(Protocol):
    """Map `(..., rows, cols)` to `(..., rows, rank)` and back: P has orthonormal columns.

    Attributes:
        keys: names that this projector owns in a parameter's state.
        kinds: which values a checkpoint may have there; likewise of a rule and a residual.
        common: the keys that a stack has once for all of its matrices.
        bases: the keys of tensors `(..., cols, rank)`.
        on_refresh: what can be done with the moments when the subspace moves.
        learns: the subspace comes from the gradient.
        decomposes: it takes a decomposition, whose bits may differ from machine to machine. All
            processes then use the result of one.
        whole: it takes a matrix whole or not at all, instead of a part of every row.
        everything: it always takes the matrix whole; P is the unit matrix.
        captures: how much of it a CUDA graph may hold. "refresh": all; "step": the steps between
            refreshes; "": nothing, because a refresh makes tensors at other addresses.
    """

    keys: ClassVar[tuple[str, ...]]
    kinds: ClassVar[Mapping[str, Kind]]
    common: ClassVar[tuple[str, ...]]
    bases: ClassVar[tuple[str, ...]]
    on_refresh: ClassVar[tuple[str, ...]]
    learns: ClassVar[bool]
    decomposes: ClassVar[bool]
    whole: ClassVar[bool]
    everything: ClassVar[bool]
    captures: ClassVar[str]

    def width(self, site: Site) -> int:
        """Return the number of columns of `low`: the rank, or 0 while the matrix sits out."""

    def init(self, batch: tuple[int, ...], dtype: torch.dtype, site: Site) -> State:
        """Return the state before the first refresh: a valid subspace that knows no gradient."""

    def refresh(self, matrices: Sequence[Matrix]) -> None:
        """Move the subspaces of matrices of one shape, dtype and device, in place.

        A subspace that comes from the gradient stays as it is if the gradient is all zero or has a
        value that is not finite. Where rows are shared out, what is learnt is summed over the
        `team` of the sites, one for all matrices. Where the projector `decomposes`, it is enough
        that the process which `team.owns` a matrix's place knows the result. Nothing here may wait
        for the device.
        """

    def factor(self, state: State, site: Site) -> Factor:
        """Return P, `(..., cols, rank)`; `(rank,)` integers for a choice of columns; or `UNIT`."""

    def places(self, before: Sequence[State], states: Sequence[State]) -> Tensor | None:
        """Return where the columns of K subspaces were before, or -1; None if they are no subsets.

        Args:
            before, states: of K matrices of one shape.
        """

    def transport(
        self, rule: Rule, moments: Moments, before: State, state: State, site: Site, group: Group
    ) -> None:
        """Carry the moments from the subspace in `before` into the one in `state`, in place."""

    def align(self, before: State, state: State) -> None:
        """Turn the new basis inside its own span towards the old one, in place."""


class Rule(Protocol):
    """What turns gradients into a direction: Adam, Lion, Muon. It knows no lr and no decay.

    Optional, and looked for when it is there: `numbers`, as in any part, and
    `directions(grads, moments, count, group)`, which does what `direction` does with several small
    gradients of one count, and returns a list.

    Attributes:
        slots: its moments, of the size of the projected gradient.
        squares: the moments that are averages of squares and never negative.
        keys: what else it keeps that is the same on all processes that share a matrix.
        row_keys: what else it keeps with one row of values a row.
        kinds: which values a checkpoint may have there.
        whole: its directions take a whole matrix and are found by `complete`.
        unprojected: it makes no sense in a subspace.
    """

    slots: ClassVar[tuple[str, ...]]
    squares: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[str, ...]]
    row_keys: ClassVar[tuple[str, ...]]
    kinds: ClassVar[Mapping[str, Kind]]
    whole: ClassVar[bool]
    unprojected: ClassVar[bool]

    @property
    def plain(self) -> Rule:
        """The rule of parameters that are not projected."""

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return what it keeps for a projected parameter besides its moments.

        Args:
            batch: `(E,)` for a stack of E matrices, else `()`.
            rows: number of rows that this process holds.
            site: the parameter's.
        """

    def direction(
        self, grad: Tensor, moments: Moments, count: int | Tensor, group: Group
    ) -> Tensor:
        """Update the moments in place with the `count`-th gradient and return the direction."""

    def complete(
        self, directions: Sequence[Tensor], jobs: Sequence[Job], group: Group
    ) -> list[Tensor]:
        """Return the final directions of matrices of one shape, as far as they lie here.

        Called where the rule is `whole`, with what `direction` returned, on all processes that
        share the matrices; state of the jobs in place.
        """

    def rotate(self, moments: Moments, rotation: Tensor, count: int, group: Group) -> None:
        """Carry moments of `count` gradients by `P_old^T P_new` `(..., rank, rank)`, in place."""

    def uncorrected(self, count: int | Tensor, group: Group) -> float | Tensor:
        """Return the factor from the direction to the one without bias correction."""

    def counts_on_device(self, param: Tensor, moments: State, group: Group) -> bool:
        """Return whether `step_plain` wants the step count of this parameter on its device."""

    def step_plain(self, jobs: list[Job], group: Group) -> list[Job]:
        """Do whole steps of parameters that are not projected; return the jobs left undone."""


class Residual(Protocol):
    """What happens to the part of the gradient that the projection drops.

    `want` says which results of `functional.project_moments` it and its update need. `keys` are
    the names of its state with one number a matrix, `row_keys` of its state with one number a row.
    """

    kinds: ClassVar[Mapping[str, Kind]]

    @property
    def want(self) -> Want:
        """What has to be computed."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of what it keeps for each matrix."""

    @property
    def row_keys(self) -> tuple[str, ...]:
        """Names of what it keeps for each row."""

    def init(self, batch: tuple[int, ...], rows: int, site: Site) -> State:
        """Return its state for one parameter: tensors of shape `batch`, or `(*batch, rows, 1)`."""

    def sums(self, norms: Norms | None, state: State, site: Site, group: Group) -> Tensor | None:
        """Return what the update needs summed over all rows of each matrix, `(..., k)`, or None.

        Called if it wants norms. What is kept for rows changes here, in place.
        """

    def update(self, norms: Norms | None, state: State, site: Site, group: Group) -> Update:
        """Return the factors of the update, from row norms; called after `sums`."""

    def limited(
        self, sums: Tensor, state: State, site: Site, group: Group, uncorrected: float | Tensor
    ) -> Tensor | float:
        """Return a factor of `low` and `grad`, `(..., 1, 1)`, by what `sums` has come to.

        Called where `sums` returns some; state in place. `uncorrected` is the result of
        `Rule.uncorrected`.
        """


class Fed(NamedTuple):
    """What a feed makes of a gradient, `(..., rows, cols)`.

    Attributes:
        grad: what is projected, and what the residual sees.
        lesson: what the subspace is learnt from.
        kept: what is stored at the end of the step, by slot, less what is then `taken`.
    """

    grad: Tensor
    lesson: Tensor
    kept: Moments


class Feed(Protocol):
    """What is fed to the projector in place of the gradient, and carried to the next step.

    Attributes:
        slots: full-size tensors `(..., rows, cols)`, row for row like the parameter. A slot named
            as a moment of the rule takes its place: the rule then sees its projection.
        dtype: how they are stored: a `state_dtype`, "4bit", or None, which is the moments' own.
        needs: moments that the rule must have.
        on_refresh: what may become of the other moments when the subspace moves; None: anything.
        full: it is of use also where the projection drops nothing.
        captures: a CUDA graph may hold it; not so if it reads a step count on the host.
    """

    slots: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]
    on_refresh: ClassVar[tuple[str, ...] | None]
    full: ClassVar[bool]
    captures: ClassVar[bool]

    @property
    def dtype(self) -> str | None:
        """How the slots are stored."""

    def feed(self, grad: Tensor, held: Moments, carried: Carried, group: Group) -> Fed:
        """Return what is fed, before the subspace moves; `held` may be changed in place.

        Args:
            grad: the gradient in its own dtype, `(..., rows, cols)`, never widened whole.
            held: the slots in the dtype of the arithmetic.
            carried: the moments in the subspace as it is.
            group: its settings.
        """

    def taken(self, low: Tensor, moments: Moments, group: Group) -> Tensor | None:
        """Return what leaves the slots, `(..., rows, rank)` in the moved subspace; None: nothing.

        Args:
            low: projection of what was fed.
            moments: carried into the moved subspace, before the rule changes them.
            group: its settings.
        """


class Storage(Protocol):
    """How moments are made; the state itself shows how a moment is stored."""

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
