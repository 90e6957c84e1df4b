"""The GaLore protocol, honestly: every method's rates are tuned by the same search, AdamW's first.

  python benchmarks/pretrain.py tune final --task 3m       two cores, hours
  python benchmarks/pretrain.py tune final --task 60m --device cuda --budget 560   again until done

tune:  compass search over both rates and the betas, on texts that are used for nothing else.
descend: lower rates than the best so far, while they help.
final: several seeds at the best rates, which are those found in float32, whatever `--weights` and
`--state` are.
Rows go to results/pretrain.csv, curves beside it, the texts' hashes to results/pretrain_text.json.
What is in the ledger is not run again; a run that the budget cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pretraining import data
from pretraining.ledger import Ledger
from pretraining.methods import METHODS, Spec
from pretraining.runner import Runs, add_options, each, run
from pretraining.tasks import TASKS
from pretraining.tune import POINTS, base, descending, tuned, tuning
from rich.console import Console


def main(argv: list[str] | None = None) -> int:
    """Do the phases in order; exit status 1 if the budget ended before they were done."""
    args = parse(argv)
    ledger = Ledger(args.results)
    end = time.monotonic() + args.budget
    note_text(ledger, args.task, args.work, args.text)
    for phase in args.phases:
        args.budget = end - time.monotonic()
        finished = run(PHASES[phase](ledger, args), args)
        if not finished:
            break
    for method in args.methods:
        show(ledger, base(args.task, method, args.steps))
    return 0 if finished else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("phases", nargs="+", choices=PHASES)
    add_search(parser, "3m", POINTS)
    parser.add_argument("--weights", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--state", default="float32", choices=["float32", "bfloat16", "8bit"])
    add_options(parser)
    return parser.parse_args(argv)


def add_search(parser: argparse.ArgumentParser, task: str, points: int) -> None:
    """Add what a search and its final runs read, with a task and runs of a search as defaults."""
    parser.add_argument("--task", default=task, choices=TASKS)
    parser.add_argument("--methods", type=names, default=list(METHODS), help="comma-separated")
    parser.add_argument("--steps", type=int, help="of a run; the task's otherwise")
    parser.add_argument("--points", type=int, default=points, help="runs of a search")
    parser.add_argument(
        "--near",
        metavar="TASK[:STEPS]",
        help="begin a search at the rates found for another task or length, with small steps",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])


def names(text: str) -> list[str]:
    """Read names of methods."""
    found = text.split(",")
    for name in found:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    return found


def tune(ledger: Ledger, args: argparse.Namespace) -> Iterator[Runs]:
    """Yield a search for each method."""
    for method in args.methods:
        near = None
        if args.near is not None:
            task, _, steps = args.near.partition(":")
            near, _, _ = tuned(ledger, base(task, method, int(steps) if steps else None))
        yield tuning(ledger, base(args.task, method, args.steps), args.points, near)


def descend(ledger: Ledger, args: argparse.Namespace) -> Iterator[Runs]:
    """Yield a search downwards for each method."""
    for method in args.methods:
        spec, _, _ = tuned(ledger, base(args.task, method, args.steps))
        yield descending(ledger, spec, args.points)


def final(ledger: Ledger, args: argparse.Namespace) -> list[Runs]:
    """Return a run for each seed and method, at the rates that were found in float32."""
    wanted: list[Spec] = []
    for seed in args.seeds:
        for method in args.methods:
            spec, _, _ = tuned(ledger, base(args.task, method, args.steps))
            state = args.state if METHODS[method].record.optimizer is not None else "float32"
            wanted.append(
                spec._replace(split="final", seed=seed, weights=args.weights, state=state)
            )
    return each(dict.fromkeys(wanted))


PHASES = {"tune": tune, "descend": descend, "final": final}


def note_text(ledger: Ledger, task: str, work: Path, source: str = "machine") -> None:
    """Write what a task's text is beside the ledger; ValueError if its runs are of another."""
    text = data.load(TASKS[task].vocab, TASKS[task].text << 20, work, source)
    ledger.check_text(task, text.name)
    path = ledger.path.with_name(f"{ledger.path.stem}_text.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get(task) != text.manifest:
        path.parent.mkdir(parents=True, exist_ok=True)
        known[task] = text.manifest
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def show(ledger: Ledger, like: Spec) -> None:
    """Say what the search of a method came to."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        spec, loss, runs = tuned(ledger, like)
    except LookupError as error:
        console.print(str(error))
        return
    console.print(
        f"{spec.method}: lr {spec.lr:g}, rest_lr {spec.rest_lr:g}, betas {spec.beta1:g} and "
        f"{spec.beta2:g}: {loss:.4f}, the best of {runs}"
    )


if __name__ == "__main__":
    sys.exit(main())
