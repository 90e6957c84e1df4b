"""What smaller states cost: the demo's runs with moments in float32, bfloat16 and 8 bits.

Same model, texts, rates and steps as the demo, some seeds; 150 steps are a seventh of what a second
moment remembers at 0.999, so it says nothing of long runs. Rows go to results/state_quality.csv.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lowrank_optim.demo.corpus import load_corpus
from lowrank_optim.demo.recipes import choose
from lowrank_optim.demo.train import Settings, train

RESULTS = Path(__file__).parent / "results" / "state_quality.csv"
STATES = ("float32", "bfloat16", "8bit")
FIELDS = ("method", "state_dtype", "seed", "steps", "val_loss", "state_bytes", "torch", "threads")


def main(argv: list[str] | None = None) -> None:
    """Train every method with every state, then show losses and bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default="galore,fira,frugal", help="comma-separated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    corpus, rows = load_corpus(), []
    for recipe in choose(args.methods.split(",")):
        for state in STATES:
            dtype = {} if state == "float32" else {"state_dtype": state}
            changed = replace(recipe, settings={**recipe.settings, **dtype})
            for seed in args.seeds:
                settings = Settings(steps=args.steps, seed=seed, curve_points=1)
                run = train(changed, corpus, settings)
                loss = f"{run.validation_loss:.4f}"
                rows.append(
                    (recipe.name, state, seed, args.steps, loss, run.state_bytes,
                     torch.__version__, torch.get_num_threads())
                )  # fmt: skip
    with args.results.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([FIELDS, *rows])
    table = Table(title=f"validation loss after {args.steps} steps, nats a byte; state in MiB")
    for name in ("method", "state", *(f"seed {seed}" for seed in args.seeds), "MiB"):
        table.add_column(name, justify="left" if name in ("method", "state") else "right")
    for recipe in choose(args.methods.split(",")):
        for state in STATES:
            found = [row for row in rows if row[:2] == (recipe.name, state)]
            table.add_row(
                recipe.label, state, *(row[4] for row in found), f"{found[0][5] / 2**20:.2f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
