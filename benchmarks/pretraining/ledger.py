"""Where runs are written: a row each in a CSV, and their curves in JSON lines beside it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .methods import Spec
from .train import Result

KINDS: dict[str, Any] = {
    "seed": int, "steps": int, "lr": float, "rest_lr": float, "beta1": float, "beta2": float,
    "rank": float, "gap": int, "weight_decay": float,
}  # fmt: skip
FIELDS = (
    *Spec._fields, "loss", "state_bytes", "parameters", "seconds", "peak_bytes",
    "text", "device", "torch", "threads", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Ledger:
    """A CSV of runs; `curves` lies beside it."""

    path: Path

    @property
    def curves(self) -> Path:
        """Where the curves are."""
        return self.path.with_name(f"{self.path.stem}_curves.jsonl")

    def rows(self) -> list[dict[str, str]]:
        """Return all rows, none if there is no file."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def losses(self) -> dict[Spec, float]:
        """Return what was measured."""
        return {spec_of(row): float(row["loss"]) for row in self.rows()}

    def check_text(self, task: str, text: str) -> None:
        """Raise ValueError if runs of a task were made with another text than is at hand."""
        others = {row["text"] for row in self.rows() if row["task"] == task} - {text}
        if others:
            raise ValueError(
                f"{self.path.name} has runs of {task} with the text {', '.join(others)}, here is "
                f"{text}, and their losses cannot be compared: bring the cache of that text, or "
                "give another --results"
            )

    def curve_of(self) -> dict[Spec, list[tuple[int, float, float]]]:
        """Return the curves."""
        found = {}
        if self.curves.exists():
            for line in self.curves.read_text().splitlines():
                row = json.loads(line)
                found[spec_of(row)] = [tuple(point) for point in row["curve"]]
        return found

    def add(self, result: Result, device: str, threads: int, source: dict[str, str]) -> None:
        """Write a run; `source` is the `provenance` of the code that made it."""
        spec = result.spec._asdict()
        row = spec | {
            "loss": f"{result.loss:.5f}",
            "state_bytes": result.state,
            "parameters": result.parameters,
            "seconds": f"{result.seconds:.1f}",
            "peak_bytes": result.peak or "",
            "text": result.text,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": threads,
            **source,
        }
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        curve = [[step, round(seen, 4), round(held, 4)] for step, seen, held in result.curve]
        with self.curves.open("a") as file:
            file.write(json.dumps({**spec, "curve": curve}) + "\n")


def spec_of(row: dict[str, Any]) -> Spec:
    """Return the spec of a row."""
    return Spec(**{key: KINDS.get(key, str)(row[key]) for key in Spec._fields})
