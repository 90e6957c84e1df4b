"""The command `lowrank-optim demo`."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..integrations import require
from ..methods.registry import COMPARED
from ..terminal import CommandError, path, printable, rank, whole

if TYPE_CHECKING:
    from rich.progress import Progress

    from .corpus import Corpus
    from .recipes import Recipe
    from .train import Run, Settings

NEEDS = ("transformers", "rich", "matplotlib")
METHODS = ",".join(name for name, method in COMPARED.items() if method.in_demo)
ROOM = 2**19
"""Bytes that a folder must take before training: more than the results of all methods."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`; `choose` checks the names of methods."""
    parser.add_argument(
        "--steps", type=whole(1, 10**9), default=150, help="steps a method (%(default)s)"
    )
    parser.add_argument(
        "--methods",
        default=METHODS,
        metavar="A,B,...",
        help="comma-separated, or all, which takes some ten minutes (%(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=rank,
        default=48,
        help="columns of the subspaces, or a share of 192 such as 0.25 (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=0, help="of weights and batches (%(default)s)"
    )
    parser.add_argument(
        "--corpus",
        type=path,
        metavar="PATH",
        help="a text file or folder (Python's standard library)",
    )
    parser.add_argument(
        "--out",
        type=path,
        default=Path("lowrank-optim-demo"),
        metavar="DIR",
        help="where demo.json and demo.png go (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Train with each method under a progress bar, then show and write the results.

    All that can be checked is checked first. Results are written after each method, and shown
    however the run ends.

    Raises:
        CommandError, ImportError, OSError: for what the user can mend, in one line.
    """
    require(*NEEDS, extra="demo")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from . import report
    from .corpus import load_corpus
    from .recipes import choose
    from .train import Settings, check

    started = time.perf_counter()
    console = Console(markup=False, emoji=False, highlight=False)
    settings = Settings(steps=args.steps, rank=args.rank, seed=args.seed)
    try:
        recipes = choose([name.strip() for name in args.methods.split(",") if name.strip()])
        check(recipes, settings)
        corpus = load_corpus(args.corpus)
    except ValueError as error:
        raise CommandError(str(error)) from error
    prepare(args.out, report.FILES)
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=None),
        TextColumn("step {task.completed:>4}/{task.total}  loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    runs: list[Run] = []
    try:
        with Progress(*columns, console=console) as progress:
            for recipe in recipes:
                runs.append(_watched(recipe, corpus, settings, progress))
                report.write_numbers(report.results(runs, corpus, settings), args.out)
    finally:
        if runs:
            found = report.results(runs, corpus, settings)
            console.print(report.table(found))
            for written in report.write(found, args.out):
                console.print(f"wrote {printable(str(written))}", soft_wrap=True)
    console.print(f"took {time.perf_counter() - started:.0f} s")


def _watched(recipe: Recipe, corpus: Corpus, settings: Settings, progress: Progress) -> Run:
    """Train with one method, and show its progress."""
    from .train import train, warm_up

    task = progress.add_task(recipe.label, total=settings.steps, loss="     ")
    warm_up(recipe, corpus, settings)

    def show(step: int, loss: float) -> None:
        progress.update(task, completed=step, loss=f"{loss:.3f}")

    return train(recipe, corpus, settings, show)


def prepare(folder: Path, files: Iterable[str]) -> None:
    """Make a folder, unless it is there, and check that it takes files of these names.

    Raises:
        CommandError: it does not. No file is left behind, nor a new folder.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{name} is a folder there")
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(ROOM))
    except OSError as error:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise CommandError(f"--out: cannot write to {folder}: {error.strerror or error}") from error
