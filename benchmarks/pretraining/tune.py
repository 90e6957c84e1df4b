"""The same search for every method, and what it found."""

from __future__ import annotations

import math
from collections.abc import Generator

from .ledger import Ledger
from .methods import METHODS, Spec
from .runner import Runs
from .search import Place, best, descend, index, search, value
from .tasks import TASKS

SEED = 100
BETAS = ((0.8, 0.95), (0.9, 0.95), (0.9, 0.99), (0.9, 0.999))
POINTS = 12


def base(task: str, method: str, steps: int | None = None, **more: object) -> Spec:
    """Return a tuning run at the method's first rates."""
    length = steps or TASKS[task].steps
    lr, rest_lr = METHODS[method].start
    gap, decay = METHODS[method].gap_of(length), TASKS[task].weight_decay
    rank = METHODS[method].rank
    spec = Spec(
        task, method, "tune", SEED, length, lr, rest_lr, 0.9, 0.99, rank, gap, weight_decay=decay
    )
    return spec._replace(**more)  # type: ignore[arg-type]


def tuning(ledger: Ledger, first: Spec, points: int = POINTS, near: Spec | None = None) -> Runs:
    """Search the two rates and the betas, in view of what the ledger holds.

    Args:
        first: a run of the search, the one to start from.
        near: a run with good rates of another task or length: the search then begins at those, and
            with small steps.
    """
    done, strides = measured(ledger, first), (2, 1)
    if near is not None:
        first, strides = at(first, place_of(near)), (1,)
    return runs_of(
        search(done, place_of(first), points, lambda at: at[2] in range(len(BETAS)), strides), first
    )


def descending(ledger: Ledger, first: Spec, points: int = POINTS) -> Runs:
    """Go on from the best that was measured to lower rates, see `search.descend`."""
    return runs_of(descend(measured(ledger, first), points), first)


def runs_of(searching: Generator[Place, float, None], like: Spec) -> Runs:
    """Yield a run for each place that a search wants."""
    try:
        place = next(searching)
        while True:
            place = searching.send((yield at(like, place)))
    except StopIteration:
        return


def measured(ledger: Ledger, like: Spec) -> dict[Place, float]:
    """Return what was measured with other rates than a run's, the rest being equal."""
    return {
        place_of(spec): loss
        for spec, loss in ledger.losses().items()
        if at(spec, place_of(like)) == at(like, place_of(like))
    }


def tuned(ledger: Ledger, like: Spec) -> tuple[Spec, float, int]:
    """Return the best run of a search, its loss, and how many there were.

    Raises:
        LookupError: nothing was measured.
    """
    done = measured(ledger, like)
    if not done or not math.isfinite(done[best(done)]):
        raise LookupError(f"{like.task} {like.method}: no rates were tuned for {like}")
    return at(like, best(done)), done[best(done)], len(done)


def place_of(spec: Spec) -> Place:
    """Return the place of a run's rates on the grid."""
    return index(spec.lr), index(spec.rest_lr), BETAS.index((spec.beta1, spec.beta2))


def at(spec: Spec, place: Place) -> Spec:
    """Return the run with the rates of a place."""
    beta1, beta2 = BETAS[place[2]]
    return spec._replace(lr=value(place[0]), rest_lr=value(place[1]), beta1=beta1, beta2=beta2)


def edges(ledger: Ledger, like: Spec) -> list[str]:
    """Return the names of the axes on which no run was made beyond the best."""
    done = measured(ledger, like)
    here = best(done)
    names = ("lr", "rest_lr")
    return [
        name
        for axis, name in enumerate(names)
        if here[axis] in (min(p[axis] for p in done), max(p[axis] for p in done))
    ]
