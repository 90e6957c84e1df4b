"""The command line: `lowrank-optim COMMAND`. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from ._version import __version__
from .demo.command import add_options as demo_options
from .demo.command import run as compare_methods
from .planner.command import add_options as memory_options
from .planner.command import run as print_plans
from .terminal import CommandError, Parser, complain, finish_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can mend, 130 if stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names need not suit the terminal
    args = build_parser().parse_args(argv)
    try:
        try:
            args.run(args)
        finally:
            finish_output()
    except (CommandError, OSError) as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("stopped")
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Describe all commands; each sets `run`, a function of the parsed arguments."""
    parser = Parser(
        prog="lowrank-optim", description="Memory-efficient low-rank optimizers for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"lowrank-optim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_cite(commands)
    add_memory(commands)
    return parser


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `demo`."""
    about = "train a small LLaMA with each method and compare loss, memory and time"
    parser = commands.add_parser(
        "demo",
        help=about,
        description=about[0].upper() + about[1:] + ". Takes under 4 minutes.",
    )
    demo_options(parser)
    parser.set_defaults(run=run_demo)


def add_memory(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `memory`."""
    about = "what training takes on a card, by method: does it fit?"
    parser = commands.add_parser("memory", help=about, description=about[0].upper() + about[1:])
    memory_options(parser)
    parser.set_defaults(run=run_memory)


def run_memory(args: argparse.Namespace) -> None:
    """Plan, and say in one line what cannot be planned."""
    try:
        print_plans(args)
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error


def run_demo(args: argparse.Namespace) -> None:
    """Train with each method, and say in one line what is missing."""
    try:
        compare_methods(args)
    except ImportError as error:
        raise CommandError(str(error)) from error


def add_cite(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add `cite`."""
    about = "print the papers of methods, and this package, as BibTeX"
    parser = commands.add_parser("cite", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("names", nargs="*", metavar="METHOD", help="none: list the names")
    parser.add_argument("--list", action="store_true", help="list the names")
    parser.set_defaults(run=run_cite)


def run_cite(args: argparse.Namespace) -> None:
    """Print the entries, or what can be cited."""
    from .methods.papers import bibtex, listing

    try:
        found = bibtex(args.names) if args.names and not args.list else listing()
    except ValueError as error:
        raise CommandError(str(error)) from error
    sys.stdout.write(found)


if __name__ == "__main__":
    sys.exit(main())
