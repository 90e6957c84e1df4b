"""What bf16 weights cost: the demo with float32 weights, and with bf16 ones rounded in two ways.

Weights: "fp32" are float32, of which the model gets a rounded copy; "nearest" and "stochastic" are
the model's own bf16 weights, without and with `stochastic_rounding`. The model is the same bf16
model in all three, so are its first weights, and moments are float32: what differs is how an update
is rounded (and a digit of the projected gradient, for the product is in the gradient's dtype).
torch's AdamW has no stochastic rounding, and its moments are bf16 where weights are.

Tasks: "demo" has the steps, batches and rates of the demo. "continue" goes on for fewer steps from
the end of its AdamW run with fp32 weights, at a thirtieth of the rates, as in a fine-tuning or at
the end of a long schedule: there an update is smaller than what a bf16 weight can show.

Losses are those of the weights in float32 arithmetic. Rows go to results/bf16_weights.csv, and runs
that are in it are not done again; the figure goes to docs/bf16.png.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lowrank_optim.demo.corpus import Corpus, load_corpus
from lowrank_optim.demo.recipes import RECIPES, Recipe, build_optimizer, choose
from lowrank_optim.demo.train import (
    Settings,
    batches,
    build_model,
    evaluate,
    rate,
    validation_windows,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bf16_weights.csv"
FIGURE = ROOT / "docs" / "bf16.png"
TASKS = {"demo": Settings(), "continue": Settings(steps=100)}
SHARE = 1 / 30
"""Rates of "continue" by those of the demo."""
WEIGHTS = ("fp32", "nearest", "stochastic")
DRAWN = {
    "nearest": ("bf16, rounded to nearest", "#D55E00", -0.17),
    "stochastic": ("bf16, stochastic_rounding=True", "#0072B2", 0.17),
}
"""Name in the figure, colour, and place beside the middle."""
FIELDS = ("task", "method", "weights", "seed", "steps", "start_loss", "val_loss", "torch")


class Key(NamedTuple):
    """Which run."""

    task: str
    method: str
    weights: str
    seed: int


Rows = dict[Key, dict[str, Any]]


def train(
    recipe: Recipe, weights: str, corpus: Corpus, settings: Settings, start: nn.Module
) -> nn.Module:
    """Train from a model's weights, rounded to bf16, and return the model that is kept."""
    model = build_model(settings).to(torch.bfloat16)
    model.load_state_dict(start.state_dict())
    kept = model
    if weights == "fp32":
        kept = build_model(settings)
        kept.load_state_dict(model.state_dict())
    if weights == "stochastic":
        recipe = replace(recipe, settings={**recipe.settings, "stochastic_rounding": True})
    optimizer = build_optimizer(
        recipe, kept, rank=settings.rank, steps=settings.steps, seed=settings.seed
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    for tokens in batches(corpus.train, settings):
        model.zero_grad()
        logits: Tensor = model(input_ids=tokens[:, :-1]).logits.float()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if kept is not model:
            for param, copy in zip(kept.parameters(), model.parameters(), strict=True):
                param.grad = copy.grad.float()
        optimizer.step()
        schedule.step()
        if kept is not model:
            model.load_state_dict(kept.state_dict())
    return kept


def run(key: Key, corpus: Corpus, pretrained: nn.Module | None) -> dict[str, Any]:
    """Do a run and return its row; "continue" draws other batches than the demo."""
    recipe, settings = RECIPES[key.method], replace(TASKS[key.task], seed=key.seed)
    start = build_model(settings)
    if pretrained is not None:
        start.load_state_dict(pretrained.state_dict())
        settings = replace(settings, seed=100 + key.seed)
        recipe = replace(recipe, lr=SHARE * recipe.lr, rest_lr=SHARE * recipe.rest_lr)
    end = train(recipe, key.weights, corpus, settings, start)
    held = validation_windows(corpus.validation, settings.length, settings.windows)
    losses = [evaluate(model.float(), held, settings.batch) for model in (start, end)]
    return key._asdict() | {
        "steps": settings.steps,
        "start_loss": f"{losses[0]:.5f}",
        "val_loss": f"{losses[1]:.5f}",
        "torch": torch.__version__,
    }


def pretrain(corpus: Corpus) -> nn.Module:
    """Return the end of the demo's AdamW run."""
    settings = TASKS["demo"]
    return train(RECIPES["adamw"], "fp32", corpus, settings, build_model(settings))


def read(path: Path) -> Rows:
    """Return the rows of a file that may be missing."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {Key(row["task"], row["method"], row["weights"], int(row["seed"])): row for row in rows}


def write(rows: Rows, path: Path) -> None:
    """Write all rows, sorted."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def losses_of(rows: Rows, task: str, method: str, weights: str) -> dict[int, float]:
    """Return validation losses by seed."""
    return {
        key.seed: float(row["val_loss"])
        for key, row in rows.items()
        if key[:3] == (task, method, weights)
    }


def excess(rows: Rows, task: str, method: str, weights: str) -> list[float]:
    """Return by how much losses are above those with fp32 weights, seed by seed."""
    fp32 = losses_of(rows, task, method, "fp32")
    found = losses_of(rows, task, method, weights)
    return [found[seed] - fp32[seed] for seed in sorted(found) if seed in fp32]


def noise(rows: Rows, task: str, method: str) -> float:
    """Return the range of the losses with fp32 weights over seeds."""
    fp32 = losses_of(rows, task, method, "fp32").values()
    return max(fp32) - min(fp32)


def table(rows: Rows, task: str) -> Table:
    """Lay out means over seeds, ranges in brackets."""
    shown = Table(title=f"{task}: validation loss, nats a byte; means over seeds, ranges beside")
    shown.add_column("method", no_wrap=True)
    for head in ("seeds", "start", "fp32", "nearest - fp32", "stochastic - fp32"):
        shown.add_column(head, justify="right")
    for recipe in RECIPES.values():
        fp32 = losses_of(rows, task, recipe.name, "fp32")
        if not fp32:
            continue
        start = statistics.fmean(
            float(row["start_loss"]) for key, row in rows.items() if key[:2] == (task, recipe.name)
        )
        cells = [f"{statistics.fmean(fp32.values()):.4f} ({noise(rows, task, recipe.name):.4f})"]
        for weights in DRAWN:
            found = excess(rows, task, recipe.name, weights)
            spread = f"({min(found):+.4f}, {max(found):+.4f})" if found else ""
            cells.append(f"{statistics.fmean(found):+.4f} {spread}" if found else "-")
        shown.add_row(recipe.label, str(len(fp32)), f"{start:.4f}", *cells)
    return shown


def figure(rows: Rows, path: Path) -> None:
    """Draw what bf16 weights cost, beside the range of fp32 runs over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    demo, more = TASKS["demo"], TASKS["continue"]
    titles = (
        f"The demo: {demo.steps} steps from random weights",
        f"{more.steps} steps more, at a thirtieth of the learning rates",
    )
    drawing = Figure(figsize=(10, 4.8), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, task, title in zip(drawing.subplots(1, 2, sharey=True), TASKS, titles, strict=True):
        draw(axes, rows, task)
        axes.set_title(title, loc="left", fontsize=10)
    names = drawing.axes[1].get_legend_handles_labels()
    drawing.axes[1].legend(*names, loc="lower left", frameon=False, fontsize=8.5)
    drawing.axes[0].set_ylabel("nats a byte")
    drawing.suptitle(
        "Validation loss with bf16 weights, above that with fp32 weights",
        fontsize=11,
        fontweight="bold",
    )
    drawing.supxlabel(
        "Bars: means over seeds, which are the dots. The same bf16 model in all runs; "
        "moments are float32, but bf16 in torch's AdamW with bf16 weights.",
        fontsize=8,
        color="#555555",
    )
    drawing.savefig(path, dpi=160)


def draw(axes: Any, rows: Rows, task: str) -> None:
    """Draw one task: bars of means, a dot a seed, and the noise as a band behind them."""
    axes.use_sticky_edges = False
    for place, recipe in enumerate(RECIPES.values()):
        if not losses_of(rows, task, recipe.name, "fp32"):
            continue
        band = noise(rows, task, recipe.name)
        name = None if place else "range of the fp32 runs over seeds, both ways"
        axes.bar(place, 2 * band, 0.84, -band, color="#dddddd", label=name, zorder=1)
        for weights, (label, colour, shift) in DRAWN.items():
            found = excess(rows, task, recipe.name, weights)
            if found:
                name = label if place == 1 else None
                mean = statistics.fmean(found)
                axes.bar(place + shift, mean, 0.3, color=colour, label=name, zorder=2)
                at = [place + shift] * len(found)
                axes.plot(at, found, "o", ms=4, color=colour, mec="white", mew=0.6, zorder=3)
    axes.axhline(0, color="black", lw=0.8, zorder=2.5)
    axes.set_xticks(range(len(RECIPES)), [recipe.label for recipe in RECIPES.values()])
    axes.grid(axis="y", color="#dddddd", lw=0.6, zorder=0)
    axes.tick_params(axis="both", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Do the runs that are missing, then show all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--methods", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    corpus, rows = load_corpus(), read(args.results)
    wanted = [
        Key(task, recipe.name, weights, seed)
        for task in args.tasks.split(",")
        for seed in args.seeds
        for recipe in choose(args.methods.split(","))
        for weights in (WEIGHTS if recipe.name != "adamw" else WEIGHTS[:2])
    ]
    missing = [key for key in wanted if key not in rows]
    continued = any(key.task == "continue" for key in missing)
    pretrained = pretrain(corpus) if continued else None
    for key in missing:
        rows[key] = run(key, corpus, pretrained if key.task == "continue" else None)
        write(rows, args.results)
    for task in TASKS:
        Console().print(table(rows, task))
    figure(rows, args.figure)


if __name__ == "__main__":
    main()
