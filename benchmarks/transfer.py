"""Every method at AdamW's own rates: what a swap costs, and whose direction is worth what.

  python benchmarks/transfer.py adamw --task bytes-128          first: AdamW's rates and betas
  python benchmarks/transfer.py swap scales --task bytes-128    then the others, at exactly those
  python benchmarks/transfer.py adamw swap --task bytes-128 --steps 1600 --near bytes-128

adamw:  compass search over AdamW's two rates and its betas, on texts that are used for nothing
        else, then AdamW's final seeds.
swap:   every method at AdamW's rates, betas and decay, with each of `--lengths`; scale 1 but where
        the length is the published one.
own:    the same search for each method with its published length, then its final seeds.
scales: every method with AdamW's length, times each of `--scales`; AdamW at as many times its rate
        of the matrices.
sweep:  both of AdamW's rates times each of `--factors`, for AdamW and every method.
conditions: the swap with AdamW's length under other decay, clipping, schedule and batch, and at
        rates that are wrong by 3.
All but the searches is judged by the final texts. The text is that of the standard library alone,
so that who has the same release of Python can go on where others stopped; pretrain.csv has another.
Rows go to results/transfer.csv, curves beside it, the texts' hashes to results/transfer_text.json.
What is in the ledger is not run again; a run that the budget cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from pretrain import add_search, note_text
from pretraining.ledger import Ledger
from pretraining.methods import METHODS, Spec
from pretraining.runner import RESULTS, Runs, add_options, each, run
from pretraining.tasks import TASKS
from pretraining.tune import base, tuned, tuning

LENGTHS = ("published", "rms", "adamw")
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
POINTS = 10
FIRST: dict[str, object] = {"lr": 1.7e-3, "rest_lr": 0.03, "beta2": 0.999}
"""Where AdamW's search begins, with small steps: what was best on another text."""


def main(argv: list[str] | None = None) -> int:
    """Do the phases in order; exit status 1 if the budget ended before they were done."""
    args = parse(argv)
    ledger = Ledger(args.results)
    end = time.monotonic() + args.budget
    note_text(ledger, args.task, args.work, args.text)
    for phase in args.phases:
        args.budget = end - time.monotonic()
        if not run(PHASES[phase](ledger, args), args):
            return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("phases", nargs="+", choices=PHASES)
    add_search(parser, "bytes-128", POINTS)
    parser.add_argument(
        "--rates-of", type=int, metavar="STEPS", help="AdamW's rates from its search over these"
    )
    parser.add_argument("--lengths", nargs="+", default=LENGTHS, choices=LENGTHS)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS)
    add_options(parser)
    parser.set_defaults(results=RESULTS.with_name("transfer.csv"), text="stdlib")
    return parser.parse_args(argv)


def adamw(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return AdamW's search, with its final seeds."""
    first = base(args.task, "adamw", args.steps)
    start = first._replace(**FIRST)  # type: ignore[arg-type]
    if args.near is not None:
        task, _, steps = args.near.partition(":")
        start, _, _ = tuned(ledger, base(task, "adamw", int(steps) if steps else None))
    return [best_of(ledger, first, args, start)]


def own(ledger: Ledger, args: argparse.Namespace) -> Iterator[Runs]:
    """Yield each method's search with its published length, with its final seeds."""
    for method in others(args.methods):
        first = base(args.task, method, args.steps, change=change_of("published"))
        yield best_of(ledger, first, args)


def best_of(
    ledger: Ledger, first: Spec, args: argparse.Namespace, near: Spec | None = None
) -> Runs:
    """Search the rates, then run the seeds at the best."""
    yield from tuning(ledger, first, args.points, near)
    found, _, _ = tuned(ledger, first)
    for seed in args.seeds:
        yield found._replace(split="final", seed=seed)


def swap(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return every method at AdamW's rates, with each length."""
    like = reference(ledger, args.task, args.steps, args.rates_of)
    return seeded(
        (
            swapped(like, method, length)
            for length in args.lengths
            for method in others(args.methods)
        ),
        args,
    )


def scales(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return every method with AdamW's length times each scale; AdamW with its rate."""
    like = reference(ledger, args.task, args.steps, args.rates_of)
    return seeded(
        (scaled(like, method, scale) for scale in args.scales for method in args.methods), args
    )


def sweep(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return every method with AdamW's length, and AdamW, at AdamW's rates times each factor."""
    like = reference(ledger, args.task, args.steps, args.rates_of)
    return seeded(
        (
            faster(swapped(like, method), factor)
            for factor in args.factors
            for method in args.methods
        ),
        args,
    )


def conditions(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return every method with AdamW's length, and AdamW, under each condition."""
    like = reference(ledger, args.task, args.steps, args.rates_of)
    return seeded(
        (
            CONDITIONS[condition](swapped(like, method))
            for condition in args.conditions
            for method in args.methods
        ),
        args,
    )


def reference(ledger: Ledger, task: str, steps: int | None, rates_of: int | None = None) -> Spec:
    """Return AdamW's final run at its tuned rates, with seed 0.

    Args:
        steps: of the run; None for the task's.
        rates_of: steps of the runs of the search, if other than that.

    Raises:
        LookupError: AdamW's rates were not searched for.
    """
    found, _, _ = tuned(ledger, base(task, "adamw", rates_of or steps))
    return found._replace(split="final", seed=0, steps=steps or TASKS[task].steps)


def swapped(like: Spec, method: str, length: str = "adamw", scale: float = 1.0) -> Spec:
    """Return a method's run at exactly AdamW's rates, betas and decay; AdamW's own stays."""
    if method == "adamw":
        return like
    known = METHODS[method]
    return like._replace(
        method=method,
        rank=known.rank,
        gap=known.gap_of(like.steps),
        change=change_of(length, scale),
    )


def change_of(length: str, scale: float = 1.0) -> str:
    """Return the settings of a length; the published one has the method's own scale."""
    return f'length="{length}"' + ("" if length == "published" else f", scale={scale}")


def scaled(like: Spec, method: str, scale: float) -> Spec:
    """Return a method's run with so many times AdamW's length."""
    if method == "adamw":
        return like._replace(lr=times(like.lr, scale))
    return swapped(like, method, scale=scale)


def faster(spec: Spec, factor: float) -> Spec:
    """Return a run with so many times both rates."""
    return spec._replace(lr=times(spec.lr, factor), rest_lr=times(spec.rest_lr, factor))


def times(rate: float, factor: float) -> float:
    """Return a product without the noise of its last digits: it names a run."""
    return float(f"{rate * factor:.6g}")


def at_variant(variant: str) -> Callable[[Spec], Spec]:
    """Return what gives a run the conditions of a variant of its task, see `tasks.variants`."""
    return lambda spec: spec._replace(task=f"{spec.task}+{variant}")


CONDITIONS: dict[str, Callable[[Spec], Spec]] = {
    "decay": lambda spec: spec._replace(weight_decay=0.0 if spec.weight_decay else 0.1),
    "clip": at_variant("clip"),
    "stable": at_variant("stable"),
    "batch": at_variant("batch"),
    "rates x 3": lambda spec: faster(spec, 3),
    "rates / 3": lambda spec: faster(spec, 1 / 3),
}
"""Where a task decays or clips, the condition is without it; where it does not, with 0.1 or 1."""
PHASES: dict[str, Callable[[Ledger, argparse.Namespace], Iterable[Runs]]] = {
    "adamw": adamw,
    "swap": swap,
    "own": own,
    "scales": scales,
    "sweep": sweep,
    "conditions": conditions,
}


def others(methods: list[str]) -> list[str]:
    """Return the methods that are not AdamW."""
    return [method for method in methods if method != "adamw"]


def seeded(specs: Iterable[Spec], args: argparse.Namespace) -> list[Runs]:
    """Return the runs with each seed, all of one seed first."""
    wanted = list(specs)
    return each(dict.fromkeys(spec._replace(seed=seed) for seed in args.seeds for spec in wanted))


if __name__ == "__main__":
    sys.exit(main())
