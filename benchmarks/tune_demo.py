"""Choose the demo's learning rates, (matrices, rest), by the same search for each method.

Compass search on a grid of quarter decades (1, 1.7, 3, 5.5, 10): from a start, try both neighbours
on each axis, move to the best, halve the stride from a factor of 3 to 1.7 when nothing is better,
and spend what is left on the diagonals, so that every method gets the same number of runs.
Same model, steps and schedule as the demo, another seed, and validation on texts that the demo
trains on; the demo's own validation texts are never read. One row a run goes to
results/tune_demo.csv; runs already there are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from pretraining.search import Place, best, index, search, value
from provenance import provenance
from rich.console import Console
from rows import append, read

from lowrank_optim.demo.corpus import Corpus, load_corpus
from lowrank_optim.demo.recipes import RECIPES, choose
from lowrank_optim.demo.train import Settings, train

RESULTS = Path(__file__).parent / "results" / "tune_demo.csv"
SEED, THREADS, POINTS = 1, 1, 12
KEY = ("method", "lr", "rest_lr", "steps", "seed")
FIELDS = (*KEY, "val_loss", "torch", "threads", "date", "commit")
STARTS = {
    "adamw": (1e-3, 1e-2),
    "galore": (1e-2, 1e-2),
    "dct": (3e-3, 1e-2),
    "fira": (3e-3, 1e-2),
    "frugal": (1e-3, 1e-2),
    "apollo": (3e-3, 1e-2),
    "lowrank": (1.7e-3, 1e-2),
    "ldadam": (1e-3, 1e-2),
    "trion": (1.7e-2, 1e-2),
    "compensated": (1e-2, 1e-2),
    "conda": (1e-2, 1e-2),
    "muon": (1.7e-2, 1e-2),
    "normuon": (3e-3, 1e-2),
    "racs": (1.7e-2, 1e-2),
}


def main(argv: list[str] | None = None) -> None:
    """Search for each method, then show its best."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--points", type=int, default=POINTS, help="runs a method")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the csv to extend")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    console = Console(highlight=False, soft_wrap=True)
    corpus = load_corpus(tuning=True)
    settings = Settings(steps=args.steps, seed=SEED, curve_points=1, windows=512)
    for recipe in choose(args.methods.split(",")):
        done = known(read(args.results), recipe.name, args.steps)
        start = (index(STARTS[recipe.name][0]), index(STARTS[recipe.name][1]))
        searching, loss = search(done, start, args.points), None
        with contextlib.suppress(StopIteration):
            while True:
                place = next(searching) if loss is None else searching.send(loss)
                rates = (value(place[0]), value(place[1]))
                loss = run(recipe.name, rates, corpus, settings, args.results)
                console.print(f"{recipe.name} lr={rates[0]:g} rest_lr={rates[1]:g}: {loss:.4f}")
    for name in RECIPES:
        done = known(read(args.results), name, args.steps)
        if done:
            console.print(verdict(name, done))


def verdict(name: str, done: dict[Place, float]) -> str:
    """One line: a method's best rates, and the axes on which no run was made beyond them."""
    at = best(done)
    edges = [
        label
        for axis, label in enumerate(("lr", "rest_lr"))
        if at[axis] in (min(place[axis] for place in done), max(place[axis] for place in done))
    ]
    edge = f", on the edge of {' and '.join(edges)}" if edges else ""
    rates = f"lr {value(at[0]):g}, rest_lr {value(at[1]):g}"
    return f"{name}: {rates}: {done[at]:.4f} ({len(done)} runs{edge})"


def run(
    name: str, rates: tuple[float, float], corpus: Corpus, settings: Settings, path: Path
) -> float:
    """Train once and add the row; returns the validation loss."""
    recipe = replace(RECIPES[name], lr=rates[0], rest_lr=rates[1])
    loss = train(recipe, corpus, settings).validation_loss
    row = {
        "method": name,
        "lr": rates[0],
        "rest_lr": rates[1],
        "steps": settings.steps,
        "seed": settings.seed,
        "val_loss": f"{loss:.5f}",
        "threads": THREADS,
        **provenance(),
    }
    append(row, FIELDS, path)
    return loss


def known(rows: list[dict[str, str]], name: str, steps: int) -> dict[Place, float]:
    """Losses of a method's rows of this length and seed, by place on the grid."""
    return {
        (index(float(row["lr"])), index(float(row["rest_lr"]))): float(row["val_loss"])
        for row in rows
        if (row["method"], row["steps"], row["seed"]) == (name, str(steps), str(SEED))
    }


if __name__ == "__main__":
    main()
