"""The demo's losses over several seeds: what of a difference between methods is more than scatter.

One row a run goes to results/demo_seeds.csv; runs already there are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from provenance import provenance
from rich.console import Console
from rows import append, read

from lowrank_optim.demo.corpus import load_corpus
from lowrank_optim.demo.recipes import choose
from lowrank_optim.demo.train import Settings, train

RESULTS = Path(__file__).parent / "results" / "demo_seeds.csv"
FIELDS = (
    "method", "seed", "lr", "rest_lr", "val_loss", "state_mib", "steps", "windows", "torch",
    "transformers", "threads", "date",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default="all", help="comma-separated, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the csv to extend")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    corpus, console = load_corpus(), Console(highlight=False, soft_wrap=True)
    for seed in args.seeds:
        for recipe in choose(args.methods.split(",")):
            settings = Settings(steps=args.steps, seed=seed, curve_points=1)
            spec = {
                "method": recipe.name,
                "seed": seed,
                "lr": recipe.lr,
                "rest_lr": recipe.rest_lr,
                "steps": settings.steps,
            }
            if any(all(row[key] == str(spec[key]) for key in spec) for row in read(args.results)):
                continue
            run = train(recipe, corpus, settings)
            found = {**spec, "val_loss": f"{run.validation_loss:.5f}"}
            found |= {"state_mib": f"{run.state_bytes / 2**20:.3f}", "windows": settings.windows}
            found |= {"transformers": transformers.__version__, "threads": args.threads}
            source = provenance()
            found |= {"torch": source["torch"], "date": source["date"]}
            append(found, FIELDS, args.results)
            console.print(f"{recipe.name}, seed {seed}: {run.validation_loss:.4f}")


if __name__ == "__main__":
    main()
