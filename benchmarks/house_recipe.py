"""The house recipe put to the test, part by part, against AdamW with two tuned rates.

  python benchmarks/pretrain.py tune --task bytes-128 --methods adamw,lowrank     rates first
  python benchmarks/house_recipe.py seeds --task bytes-128 --steps 400            several seeds
  python benchmarks/house_recipe.py parts --task bytes-128 --steps 400            one change each

seeds: AdamW and the recipe at their best rates, of which those of longer runs and other widths are
       sought with `pretrain.py tune --near`.
parts: the recipe with one thing changed. The rate of the matrices is chosen anew for each,
       from the recipe's and its neighbours on the grid, on the tuning texts; AdamW's, where decay
       is what changes, too. Each then runs with the seeds, on the final texts. `--method frugal`
       asks the same of FRUGAL; `--same-rate` keeps its rate.
Rows go to the ledger of pretrain.py; what is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from pretraining.ledger import Ledger
from pretraining.methods import Spec
from pretraining.runner import Runs, add_options, each, run
from pretraining.search import index, value
from pretraining.tasks import TASKS
from pretraining.tune import base, tuned

METHODS = ("adamw", "lowrank")
CHANGES: dict[str, dict[str, object]] = {
    "gap 10": {"gap": 10},
    "gap 200": {"gap": 200},
    "gap 1000": {"gap": 1000},
    "rotate": {"change": "on_refresh='rotate'"},
    "align": {"change": "on_refresh='align'"},
    "reset": {"change": "on_refresh='reset'"},
    "no residual": {"change": "state_free='none'"},
    "residual 0.25": {"change": "state_free_scale=0.25"},
    "residual 0.5": {"change": "state_free_scale=0.5"},
    "residual 1": {"change": "state_free_scale=1.0"},
    "columns": {"change": "projector='columns'"},
    "random": {"change": "projector='random'"},
    "dct": {"change": "projector='dct'"},
    "power": {"change": "projector='power'"},
    "svd": {"change": "projector='svd'"},
    "rank 1/16": {"rank": 0.0625},
    "rank 1/8": {"rank": 0.125},
    "rank 1/2": {"rank": 0.5},
    "rank 1/2, 8-bit": {"rank": 0.5, "state": "8bit"},
    "8-bit": {"state": "8bit"},
    "bf16 state": {"state": "bfloat16"},
    "bf16 weights": {"weights": "bfloat16"},
    "no decay": {"weight_decay": 0.0},
}
KEPT_RATES = ("8-bit", "rank 1/2, 8-bit", "bf16 state", "bf16 weights", "svd")
"""Changes that must not need another rate."""
OWN = {"lowrank": ("residual 0.5", "power"), "frugal": ("reset", "residual 1", "columns")}
"""What a method has already."""


def seeds(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return the runs of both methods at their best rates."""
    found = [tuned(ledger, base(args.task, method, args.steps))[0] for method in METHODS]
    return each(spec._replace(split="final", seed=seed) for seed in args.seeds for spec in found)


def parts(ledger: Ledger, args: argparse.Namespace) -> Iterator[Runs]:
    """Yield for each change a plan: three rates, then the seeds at the best."""
    recipe, _, _ = tuned(ledger, base(args.task, args.method, args.steps))
    adamw, _, _ = tuned(ledger, base(args.task, "adamw", args.steps))
    for name in args.changes or (name for name in CHANGES if name not in OWN[args.method]):
        search = not args.same_rate and name not in KEPT_RATES
        yield changed(recipe._replace(**CHANGES[name]), args.seeds, search)  # type: ignore[arg-type]
        if name == "no decay":
            yield changed(adamw._replace(weight_decay=0.0), args.seeds, True)


def changed(spec: Spec, seeds: list[int], search: bool) -> Runs:
    """Choose a rate by the tuning texts, then run the seeds on the final ones."""
    losses = {}
    for lr in neighbours(spec.lr) if search else ():
        losses[lr] = yield spec._replace(lr=lr)
    best = min(losses, key=losses.__getitem__) if losses else spec.lr
    for seed in seeds:
        yield spec._replace(split="final", seed=seed, lr=best)


def neighbours(lr: float) -> tuple[float, float, float]:
    """Return a rate and those beside it on the grid."""
    at = index(lr)
    return value(at), value(at + 1), value(at - 1)


PARTS = {"seeds": seeds, "parts": parts}


def main(argv: list[str] | None = None) -> int:
    """Do one part of the experiments; exit status 1 if the budget ended before it was done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--task", default="bytes-128", choices=TASKS)
    parser.add_argument("--steps", type=int, help="of a run; the task's otherwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, help="of `parts`; all otherwise")
    parser.add_argument("--method", default="lowrank", choices=OWN)
    parser.add_argument("--same-rate", action="store_true", help="seek no rate for a change")
    add_options(parser)
    args = parser.parse_args(argv)
    plans = PARTS[args.part](Ledger(args.results), args)
    return 0 if run(plans, args) else 1


if __name__ == "__main__":
    sys.exit(main())
