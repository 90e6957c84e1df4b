"""The tables, as Markdown."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from pretraining.ledger import Ledger
from pretraining.methods import METHODS, Spec
from pretraining.tasks import TASKS
from pretraining.tune import SEED, base, edges, measured, tuned
from rows import read

from lowrank_optim.demo.command import METHODS as SHOWN
from lowrank_optim.demo.recipes import RECIPES

from . import cpu, gpu, swaps
from .groups import Runs, all_at_best, at_best, conditions, finals
from .layout import NOTHING, table

MIB = 2**20
RESULTS = Path(__file__).parents[1] / "results"
LR_HEADS = ("lr / 3", "lr", "3 lr")
SMALL: tuple[tuple[str, dict[str, object]], ...] = (
    ("lowrank", {}),
    ("lowrank", {"rank": 0.5, "state": "8bit"}),
    ("muon", {"state": "8bit"}),
)
"""Settings that keep a quarter of AdamW's state, or not much more."""


def spread(losses: list[float]) -> str:
    """Show a mean and the range."""
    if len(losses) == 1:
        return f"{losses[0]:.3f}"
    return f"{statistics.fmean(losses):.3f} ({min(losses):.3f} - {max(losses):.3f})"


def signed(values: list[float]) -> str:
    """Show a mean difference and the range."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    return f"{statistics.fmean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


def quality(task: str, steps: int | None = None) -> Callable[[Ledger], str]:
    """Return the table of all methods on a task, each at its best rates."""
    length = steps or TASKS[task].steps

    def made(ledger: Ledger) -> str:
        found = all_at_best(ledger, task, length)
        if not found:
            return NOTHING
        reference = found.get("adamw")
        lines = []
        for name, runs in found.items():
            spec, searched = runs.spec, len(measured(ledger, base(task, name, length)))
            cells = [
                METHODS[name].label,
                spread(list(runs.losses.values())),
                "-" if reference in (None, runs) else f"{runs.mean / reference.mean - 1:+.1%}",
                f"{runs.state / MIB:.2f}",
                "-" if reference in (None, runs) else f"{runs.state / reference.state:.0%}",
                f"{spec.lr:g}",
                f"{spec.rest_lr:g}",
                f"{spec.beta1:g}, {spec.beta2:g}",
                str(searched),
            ]
            lines.append(cells)
        heads = [
            "method", "loss, nats a token", "to AdamW", "state MiB", "of AdamW's",
            "lr", "rest lr", "betas", "runs searched",
        ]  # fmt: skip
        return f"{table(heads, lines)}\n\n{conditions(list(found.values()))}"

    return made


def small_states(task: str, steps: int | None = None) -> Callable[[Ledger], str]:
    """Return the table of what bf16 weights and 8-bit states cost, at the rates of float32."""
    length = steps or TASKS[task].steps
    kinds = {
        "bf16 weights": {"weights": "bfloat16"},
        "8-bit states": {"state": "8bit"},
        "both": {"weights": "bfloat16", "state": "8bit"},
    }

    def made(ledger: Ledger) -> str:
        lines, used = [], []
        for name, exact in all_at_best(ledger, task, length).items():
            others = {
                kind: at_best(ledger, task, name, length, **more) for kind, more in kinds.items()
            }
            if not any(others.values()):
                continue
            used += [exact, *filter(None, others.values())]
            lines.append([
                METHODS[name].label,
                f"{exact.mean:.3f}",
                *(relative(runs, exact) for runs in others.values()),
            ])  # fmt: skip
        if not lines:
            return NOTHING
        return f"{table(['method', 'float32', *kinds], lines)}\n\n{conditions(used)}"

    return made


def relative(runs: Runs | None, exact: Runs) -> str:
    """Show a mean over seeds, seed by seed, as a share of the loss."""
    if runs is None:
        return "-"
    above = runs.above(exact)
    return f"{statistics.fmean(above) / exact.mean:+.2%}" if above else "-"


def recipe(ledger: Ledger) -> str:
    """Show the house recipe and AdamW, by model and length of the run."""
    lines, used = [], []
    for task in TASKS:
        lengths = {int(row["steps"]) for row in ledger.rows() if row["task"] == task != "smoke"}
        for steps in sorted(lengths):
            adamw = at_best(ledger, task, "adamw", steps)
            ours = at_best(ledger, task, "lowrank", steps)
            if adamw is None or ours is None:
                continue
            used += [adamw, ours]
            lines.append([
                task, str(steps),
                spread(list(adamw.losses.values())), spread(list(ours.losses.values())),
                signed(ours.above(adamw)), f"{ours.state / adamw.state:.0%}",
                f"{adamw.spec.lr:g}", f"{ours.spec.lr:g}",
            ])  # fmt: skip
    if not lines:
        return NOTHING
    heads = ["task", "steps", "AdamW", "LowRankAdamW", "difference, seed by seed", "of its state",
             "AdamW's lr", "lr"]  # fmt: skip
    return f"{table(heads, lines)}\n\n{conditions(used)}"


def small(*asked: tuple[str, int]) -> Callable[[Ledger], str]:
    """Return the table of AdamW and of settings with a quarter of its state, or little more.

    Args:
        asked: tasks, each with a length of its runs.
    """

    def made(ledger: Ledger) -> str:
        lines, used = [], []
        for task, steps in asked:
            adamw = at_best(ledger, task, "adamw", steps)
            if adamw is None:
                continue
            for name, more in (("adamw", {}), *SMALL):
                found, method = at_best(ledger, task, name, steps, **more), METHODS[name]
                if found is None:
                    continue
                used.append(found)
                spec, searched = found.spec, len(measured(ledger, base(task, name, steps)))
                lines.append([
                    f"{task}, {steps}", method.label,
                    "-" if method.record.whole or name == "adamw" else f"{spec.rank:g}",
                    "8-bit" if spec.state == "8bit" else spec.state,
                    spread(list(found.losses.values())),
                    "-" if name == "adamw" else signed(found.above(adamw)),
                    f"{found.state / adamw.state:.0%}", f"{spec.lr:g}", f"{spec.rest_lr:g}",
                    f"{spec.beta1:g}, {spec.beta2:g}", str(searched),
                ])  # fmt: skip
        if not lines:
            return NOTHING
        heads = ["task, steps", "method", "rank", "states", "loss", "difference, seed by seed",
                 "of its state", "lr", "rest lr", "betas", "runs searched"]  # fmt: skip
        return f"{table(heads, lines)}\n\n{conditions(used)}"

    return made


def parts(task: str, steps: int, method: str = "lowrank") -> Callable[[Ledger], str]:
    """Return the table of the recipe, or of FRUGAL, with one thing changed."""
    from house_recipe import CHANGES

    def made(ledger: Ledger) -> str:
        exact = at_best(ledger, task, method, steps)
        if exact is None:
            return NOTHING
        lines, used = [], [exact]
        for name, more in CHANGES.items():
            found = best_final(ledger, exact, more)
            if found is not None:
                used.append(found)
                above = signed(found.above(exact))
                share = f"{found.state / exact.state:.0%}"
                lines.append([name, f"{found.mean:.3f}", above, share, f"{found.spec.lr:g}"])
        first = ["as it is", f"{exact.mean:.3f}", "-", "100%", f"{exact.spec.lr:g}"]
        heads = ["change", "loss", "difference, seed by seed", "state", "lr"]
        return f"{table(heads, [first, *lines])}\n\n{conditions(used)}"

    return made


def best_final(ledger: Ledger, exact: Runs, more: dict[str, object]) -> Runs | None:
    """Return the final runs of a change at the rate that was best in tuning, else the recipe's."""
    spec = exact.spec._replace(**more)  # type: ignore[arg-type]
    with contextlib.suppress(LookupError):
        spec, _, _ = tuned(ledger, spec._replace(split="tune", seed=SEED))
    return finals(ledger, spec)


def tries(task: str, steps: int) -> Callable[[Ledger], str]:
    """Return the table of tuning runs: AdamW, the recipe, and the recipe with one thing changed."""
    from house_recipe import CHANGES

    def made(ledger: Ledger) -> str:
        recipe = base(task, "lowrank", steps)
        asked: dict[str, Spec] = {"AdamW": base(task, "adamw", steps), "LowRankAdamW": recipe}
        asked |= {name: recipe._replace(**more) for name, more in CHANGES.items()}  # type: ignore[arg-type]
        lines = []
        for name, like in asked.items():
            with contextlib.suppress(LookupError):
                spec, loss, runs = tuned(ledger, like)
                lines.append([name, f"{loss:.3f}", f"{spec.lr:g}", f"{spec.beta2:g}", str(runs)])
        return table(["change", "loss", "lr", "beta2", "best of"], lines) if lines else NOTHING

    return made


def sensitivity(task: str, methods: tuple[str, ...]) -> Callable[[Ledger], str]:
    """Return a table a method: the loss above its best, by rank or interval, and by rate."""
    from sensitivity import GAPS, RANKS
    from sensitivity import rates as tried

    def made(ledger: Ledger) -> str:
        losses, lines, heads = ledger.losses(), [], ["method", "", *LR_HEADS]
        for name in methods:
            try:
                best, _, _ = tuned(ledger, base(task, name))
            except LookupError:
                continue
            settings = [(f"rank {rank:g}", {"rank": rank}) for rank in RANKS]
            settings += [(f"T {gap}", {"gap": gap}) for gap in GAPS if best.gap > 1]
            found = {
                label: [losses.get(best._replace(lr=lr, **more)) for lr in tried(best)]  # type: ignore[arg-type]
                for label, more in settings
            }
            least = min(loss for row in found.values() for loss in row if loss is not None)
            for label, row in found.items():
                if all(loss is None for loss in row):
                    continue
                cells = ["-" if loss is None else f"{loss - least:.3f}" for loss in row]
                lines.append([METHODS[name].label, label, cells[2], cells[0], cells[1]])
        return table(heads, lines) if lines else NOTHING

    return made


def rates(tasks: tuple[str, ...]) -> Callable[[Ledger], str]:
    """Return the table of what the searches found, in terms of AdamW's rate."""

    def made(ledger: Ledger) -> str:
        lines = []
        for name, method in METHODS.items():
            cells = []
            for task in tasks:
                try:
                    adamw, _, _ = tuned(ledger, base(task, "adamw"))
                    spec, _, _ = tuned(ledger, base(task, name))
                except LookupError:
                    cells.append("-")
                    continue
                cells.append(f"{spec.lr:g}, {spec.lr / adamw.lr:.2g} times; {spec.rest_lr:g}")
            if set(cells) != {"-"}:
                lines.append([method.label, *cells])
        return table(["method", *(f"{task}: lr; rest lr" for task in tasks)], lines)

    return made


def searched(task: str, steps: int) -> Callable[[Ledger], str]:
    """Return the table of single runs of a search, all methods at their best rates so far."""

    def made(ledger: Ledger) -> str:
        lines, reference = [], math.nan
        for name, method in METHODS.items():
            with contextlib.suppress(LookupError):
                spec, loss, runs = tuned(ledger, base(task, name, steps))
                reference = loss if name == "adamw" else reference
                open_ends = " and ".join(edges(ledger, spec)) or "-"
                lines.append([
                    method.label, f"{loss:.3f}",
                    "-" if name == "adamw" else f"{loss / reference - 1:+.1%}",
                    f"{spec.lr:g}", f"{spec.rest_lr:g}", str(runs), open_ends,
                ])  # fmt: skip
        heads = ["method", "loss", "to AdamW", "lr", "rest lr", "runs", "best at the edge of"]
        return table(heads, lines) if lines else NOTHING

    return made


def demo_runs() -> dict[str, list[dict[str, str]]]:
    """Return the runs of the demo by method, from the csv beside the ledger."""
    rows = read(RESULTS / "demo_seeds.csv")
    return {name: [row for row in rows if row["method"] == name] for name in RECIPES}


def demo_seeds(ledger: Ledger) -> str:
    """Show the range of the demo's losses over seeds, for those methods that it runs unasked."""
    runs = demo_runs()
    losses = {
        RECIPES[name].label: [float(row["val_loss"]) for row in runs[name]]
        for name in SHOWN.split(",")
    }
    ranges = [f"{min(found):.3f} - {max(found):.3f}" for found in losses.values()]
    return table(list(losses), [ranges])


def demo_all(ledger: Ledger) -> str:
    """Show all methods of the demo: losses over seeds, state, and rates."""
    lines, runs = [], demo_runs()
    mean = {k: statistics.fmean(float(row["val_loss"]) for row in v) for k, v in runs.items() if v}
    for name in sorted(mean, key=lambda name: mean[name]):
        rows, recipe = runs[name], RECIPES[name]
        state, reference = (float(some[0]["state_mib"]) for some in (rows, runs["adamw"]))
        lines.append([
            recipe.label, spread([float(row["val_loss"]) for row in rows]),
            f"{mean[name] - mean['adamw']:+.3f}", f"{state:.2f}", f"{state / reference:.0%}",
            f"{recipe.lr:g}", f"{recipe.rest_lr:g}",
        ])  # fmt: skip
    heads = [
        "method", "loss, nats a byte", "to AdamW", "state MiB", "of AdamW's", "lr", "rest lr",
    ]  # fmt: skip
    return table(heads, lines)


TABLES: dict[str, Callable[[Ledger], str]] = {
    "demo-all": demo_all,
    "demo-seeds": demo_seeds,
    "quality-3m": quality("3m"),
    "quality-60m": quality("60m", 400),
    "quality-bytes": quality("bytes-128"),
    "searched-60m": searched("60m", 400),
    "searched-192": searched("bytes-192", 4000),
    "small-states-3m": small_states("3m"),
    "recipe": recipe,
    "small": small(("bytes-128", 4000), ("bytes-128", 400), ("3m", 400)),
    "tries-1600": tries("bytes-128", 1600),
    "tries-4000": tries("bytes-128", 4000),
    **gpu.TABLES,
    **cpu.TABLES,
    **swaps.TABLES,
    "parts": parts("bytes-128", 400),
    "parts-frugal": parts("bytes-128", 400, "frugal"),
    "sensitivity": sensitivity("bytes-128", ("lowrank",)),
    "sensitivity-3m": sensitivity("3m", ("galore", "fira", "frugal")),
    "rates": rates(("bytes-128", "bytes-192", "3m")),
}
