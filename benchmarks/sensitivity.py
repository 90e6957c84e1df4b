"""How much a wrong rank, rate or refresh interval costs: one method at a time around its best.

  python benchmarks/sensitivity.py --methods lowrank,galore,fira,frugal --jobs 2

For each method, rates of the matrices from a third to three times the best one are crossed with the
ranks at the usual interval, and with the intervals at the usual rank. One seed, on the tuning
texts: the runs that a user would make to choose, not the ones that methods are compared by. Rows go
to the ledger of pretrain.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from pretrain import names
from pretraining.ledger import Ledger
from pretraining.methods import Spec
from pretraining.runner import add_options, each, run
from pretraining.search import index, value
from pretraining.tasks import TASKS
from pretraining.tune import base, tuned

RANKS = (0.0625, 0.125, 0.25, 0.5)
GAPS = (10, 50, 200)
STEPS = (0, 2, -2)
"""Places on the grid of rates: 2 is a factor of 3."""


def grid(best: Spec) -> Iterator[Spec]:
    """Yield the runs around the best one: ranks by rates, then intervals by rates."""
    for lr in rates(best):
        for rank in RANKS:
            yield best._replace(lr=lr, rank=rank)
        for gap in GAPS if best.gap > 1 else ():
            yield best._replace(lr=lr, gap=gap)


def rates(best: Spec) -> list[float]:
    """Return the rates that are tried: the best, three times and a third of it."""
    return [value(index(best.lr) + step) for step in STEPS]


def main(argv: list[str] | None = None) -> int:
    """Do the runs; exit status 1 if the budget ended before they were done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", default="bytes-128", choices=TASKS)
    parser.add_argument("--methods", type=names, default=["lowrank", "galore", "fira", "frugal"])
    add_options(parser)
    args = parser.parse_args(argv)
    ledger = Ledger(args.results)
    wanted = [
        spec for method in args.methods for spec in grid(tuned(ledger, base(args.task, method))[0])
    ]
    return 0 if run(each(dict.fromkeys(wanted)), args) else 1


if __name__ == "__main__":
    sys.exit(main())
