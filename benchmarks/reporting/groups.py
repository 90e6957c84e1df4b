"""Runs that differ by their seed alone, and the conditions that they share."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pretraining.ledger import Ledger, spec_of
from pretraining.methods import METHODS, Spec
from pretraining.tune import base, tuned

Row = dict[str, str]
Settings = dict[str, dict[str, object]]
"""Methods, each with what is not as in the search of its rates."""


@dataclass(frozen=True)
class Runs:
    """Final runs of one setting.

    Attributes:
        spec: the setting, with the first seed.
        rows: by seed.
    """

    spec: Spec
    rows: dict[int, Row]

    @property
    def losses(self) -> dict[int, float]:
        """Losses by seed, nats a token."""
        return {seed: float(row["loss"]) for seed, row in self.rows.items()}

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.losses.values())

    @property
    def state(self) -> int:
        """Bytes of state, shared bases included."""
        return int(next(iter(self.rows.values()))["state_bytes"])

    def above(self, other: Runs) -> list[float]:
        """Return by how much each seed's loss is above that of another setting, seed by seed."""
        mine, theirs = self.losses, other.losses
        return [mine[seed] - theirs[seed] for seed in sorted(mine) if seed in theirs]


def finals(ledger: Ledger, like: Spec) -> Runs | None:
    """Return the final runs of a setting, whatever its seed; None if there are none."""
    wanted = like._replace(split="final", seed=0)
    rows = {
        spec_of(row).seed: row for row in ledger.rows() if spec_of(row)._replace(seed=0) == wanted
    }
    return Runs(wanted, dict(sorted(rows.items()))) if rows else None


def at_best(ledger: Ledger, task: str, method: str, steps: int, **more: object) -> Runs | None:
    """Return the final runs of a method at the rates its search found; None if there are none."""
    try:
        spec, _, _ = tuned(ledger, base(task, method, steps))
    except LookupError:
        return None
    return finals(ledger, spec._replace(**more))  # type: ignore[arg-type]


def all_at_best(
    ledger: Ledger, task: str, steps: int, settings: Settings | None = None
) -> dict[str, Runs]:
    """Return `at_best` of every method that has any, or of those that are given."""
    asked: Settings = {name: {} for name in METHODS} if settings is None else settings
    found = {name: at_best(ledger, task, name, steps, **more) for name, more in asked.items()}
    return {name: runs for name, runs in found.items() if runs is not None}


def conditions(groups: list[Runs]) -> str:
    """Say in a sentence where and with what the runs were made."""
    rows = [row for runs in groups for row in runs.rows.values()]

    def distinct(key: str) -> str:
        return ", ".join(sorted({row[key] for row in rows}))

    device = "CPU" if distinct("device") == "cpu" else distinct("device")
    return (
        f"{device}, torch {distinct('torch')}, threads a run: {distinct('threads')}, "
        f"seeds {distinct('seed')}, commit {distinct('commit')}, {distinct('date')}."
    )
