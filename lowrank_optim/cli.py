"""The command line: `lowrank-optim COMMAND`. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ._version import __version__
from .integrations import require
from .planner.command import add_options as memory_options
from .planner.command import run as print_plans

DEMO_NEEDS = ("transformers", "rich", "matplotlib")
METHODS = "adamw,galore,dct,fira,frugal,apollo"


class CommandError(Exception):
    """What went wrong, in one line for the person at the terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can mend, 130 if stopped."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except CommandError as error:
        sys.stderr.write(f"lowrank-optim: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    """Describe all commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="lowrank-optim", description="Memory-efficient low-rank optimizers for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"lowrank-optim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_cite(commands)
    add_memory(commands)
    return parser


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo`."""
    about = "train a small LLaMA with each method and compare loss, memory and time"
    parser = commands.add_parser(
        "demo",
        help=about,
        description=about[0].upper() + about[1:] + ". Takes under 4 minutes.",
    )
    parser.add_argument("--steps", type=_positive, default=150, help="steps a method (%(default)s)")
    parser.add_argument(
        "--methods",
        default=METHODS,
        metavar="A,B,...",
        help="comma-separated, or all, which takes some ten minutes (%(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        default=48,
        help="columns of the subspaces, or a share of 192 such as 0.25 (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument(
        "--corpus", metavar="PATH", help="a text file or folder (Python's standard library)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lowrank-optim-demo"),
        metavar="DIR",
        help="where demo.json and demo.png go (%(default)s)",
    )
    parser.set_defaults(run=run_demo)


def add_memory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `memory`."""
    about = "what training takes on a card, by method: does it fit?"
    parser = commands.add_parser("memory", help=about, description=about[0].upper() + about[1:])
    memory_options(parser)
    parser.add_argument(
        "--rank",
        type=_rank,
        default=0.25,
        help="columns of the subspaces, or a share of the shorter axis (%(default)s)",
    )
    parser.set_defaults(run=run_memory)


def run_memory(args: argparse.Namespace) -> int:
    """Plan, and say in one line what cannot be planned."""
    try:
        print_plans(args)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """Train with each method under a progress bar, then show and write the results."""
    try:
        require(*DEMO_NEEDS, extra="demo")
    except ImportError as error:
        raise CommandError(str(error)) from error
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from .demo import report
    from .demo.corpus import load_corpus
    from .demo.recipes import choose
    from .demo.train import Settings, train, warm_up

    started = time.perf_counter()
    console = Console()
    settings = Settings(steps=args.steps, rank=args.rank, seed=args.seed)
    try:
        recipes = choose([name.strip() for name in args.methods.split(",") if name.strip()])
        corpus = load_corpus(args.corpus)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    runs = []
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=None),
        TextColumn("step {task.completed:>4}/{task.total}  loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for recipe in recipes:
            task = progress.add_task(recipe.label, total=args.steps, loss="     ")
            warm_up(recipe, corpus, settings)

            def show(step: int, loss: float, task: TaskID = task) -> None:
                progress.update(task, completed=step, loss=f"{loss:.3f}")

            runs.append(train(recipe, corpus, settings, show))
    found = report.results(runs, corpus, settings)
    console.print(report.table(found))
    for path in report.write(found, args.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    console.print(f"took {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


def add_cite(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cite`."""
    about = "print the papers of methods, and this package, as BibTeX"
    parser = commands.add_parser("cite", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("names", nargs="*", metavar="METHOD", help="without one: which there are")
    parser.add_argument("--list", action="store_true", help="print which there are")
    parser.set_defaults(run=run_cite)


def run_cite(args: argparse.Namespace) -> int:
    """Print the entries, or what can be cited."""
    from .citations import bibtex, listing

    try:
        found = bibtex(args.names) if args.names and not args.list else listing()
    except ValueError as error:
        raise CommandError(str(error)) from error
    sys.stdout.write(found)
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return int(text)


def _rank(text: str) -> int | float:
    """Read a number of columns (48) or a share of the projected axis (0.25)."""
    try:
        value = int(text) if text.isdigit() else float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a number of columns nor a share in (0, 1]"
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
