"""What a training step costs in wall time, of all methods in one run: results/pretrain_time.csv."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "pretrain_time.csv"


def costs(task: str, path: Path = RESULTS) -> dict[str, float]:
    """Return milliseconds of a whole step by method, refreshes included; none if not measured."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    return {row["method"]: float(row["step_ms"]) for row in rows}
