"""The command `lowrank-optim memory`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..integrations import require
from ..terminal import CommandError, named, path, rank

STATES = ("float32", "bfloat16", "8bit")
DTYPES = ("bfloat16", "float16", "float32")
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".webp")
WIDTH = 100
"""Columns of the table where the output is no terminal."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `memory`; `estimate_memory` checks the names of models and methods."""
    parser.add_argument(
        "--model",
        required=True,
        type=named,
        metavar="NAME",
        help="llama-7b and the like (an unknown name lists all), a config.json of transformers or "
        "its folder, or module:factory, a function that returns a module, or a module and its loss",
    )
    parser.add_argument(
        "--optimizer",
        metavar="A,B,...",
        help="comma-separated, adamw and adamw8bit too, or all (default: those most asked for)",
    )
    parser.add_argument("--state", choices=STATES, help="state dtype of our methods (float32)")
    parser.add_argument(
        "--layerwise", action="store_true", help="updates inside the backward pass (our methods)"
    )
    parser.add_argument("--seq", type=int, default=2048, help="tokens a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step (%(default)s)")
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the weights (%(default)s)"
    )
    parser.add_argument(
        "--gpu", type=named, metavar="CARD", help='"RTX 4090", "A100 80GB", ..., or 24GiB'
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes")
    parser.add_argument("--plot", type=path, metavar="FILE.png", help="draw stacked bars")
    parser.add_argument(
        "--rank",
        type=rank,
        default=0.25,
        help="columns of the subspaces, or a share of the shorter axis (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Plan, print and draw.

    Raises:
        ValueError, ImportError, CommandError, OSError: for what the user can mend, in one line.
    """
    require("rich", *(["matplotlib"] if args.plot else []), extra="demo")
    import torch

    from . import report
    from .estimate import estimate_memory

    if args.plot is not None:
        _check_plot(args.plot)
    names = None if args.optimizer is None else [x.strip() for x in args.optimizer.split(",")]
    plans = estimate_memory(
        args.model,
        optimizer=names,
        rank=args.rank,
        state_dtype=args.state,
        layerwise=args.layerwise,
        batch=args.batch,
        seq=args.seq,
        checkpointing=args.checkpointing,
        dtype=getattr(torch, args.dtype),
        gpu=args.gpu,
    )
    if args.json:
        sys.stdout.write(report.as_json(plans) + "\n")
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        console.print(report.table(plans))
    if args.plot is not None:
        report.figure(plans, args.plot)


def _check_plot(target: Path) -> None:
    """Raise CommandError where a figure cannot be written."""
    if not target.absolute().parent.is_dir():
        raise CommandError(f"--plot: there is no folder {target.parent}")
    if target.is_dir():
        raise CommandError(f"--plot: {target} is a folder")
    if target.suffix.lower() not in PICTURES:
        raise CommandError(f"--plot: {target} must end in one of {', '.join(PICTURES)}")
