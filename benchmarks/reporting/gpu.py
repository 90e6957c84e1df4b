"""The tables of what was measured on a GPU, from the csv files beside the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pretraining.ledger import Ledger
from rows import read

from lowrank_optim.methods.registry import COMPARED, shown_first

from .layout import NOTHING, table

RESULTS = Path(__file__).parents[1] / "results"
GIB = 2**30
Row = dict[str, str]


def source(rows: list[Row]) -> str:
    """Return the conditions in a line."""
    parts = (
        ", ".join(sorted({row["device"] for row in rows})),
        f"torch {rows[0]['torch']}, triton {rows[0]['triton']}",
        "commit " + ", ".join(dict.fromkeys(row["commit"] for row in rows)),
        max(row["date"] for row in rows),
    )
    return ", ".join(parts) + "."


def table_of(name: str, show: Callable[[list[Row]], str]) -> Callable[[Ledger], str]:
    """Return the table that `show` makes of the rows of a csv, with its conditions."""

    def made(ledger: Ledger) -> str:
        rows = read(RESULTS / name)
        return f"{show(rows)}\n\n{source(rows)}" if rows else NOTHING

    return made


def planned(rows: list[Row]) -> str:
    """Show what was planned and what was measured, a line a method."""
    at = {(row["method"], row["size"], row["layerwise"]): row for row in rows}
    lines = []
    for name, method in shown_first("in_planner").items():
        cells = []
        for size in ("1b", "7b"):
            for layerwise in ("no", "yes"):
                row = at.get((name, size, layerwise))
                if row is None:
                    cells.append("-")
                    continue
                plan, found = int(row["planned_bytes"]), int(row["measured_bytes"])
                cells.append(f"{plan / GIB:.2f}, {found / GIB:.2f} ({plan / found - 1:+.1%})")
        if any(cell != "-" for cell in cells):
            lines.append([method.label, *cells])
    heads = ["planned, measured, GiB", "1B", "1B, layer-wise", "7B", "7B, layer-wise"]
    return table(heads, lines)


def steps(rows: list[Row]) -> str:
    """Show the times of a step of 7B beside AdamW's and beside the floors, ms."""
    kinds: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        kinds.setdefault((-int(row["rank"]), row["method"]), {})[row["kind"]] = row
    lines = []
    for (rank, name), at in sorted(
        kinds.items(), key=lambda item: (item[0][0], float(item[1]["between"]["ms"]))
    ):
        if name == "adamw" and lines:
            continue  # the baseline of another rank: the same step

        def cell(kind: str, key: str = "ms", form: str = ".0f", at: dict[str, Row] = at) -> str:
            value = at.get(kind, {}).get(key)
            return f"{float(value):{form}}" if value else "-"

        row = at["between"]
        state = int(row["state_bytes"] or 4 * int(row["params"])) / GIB
        lines.append([
            name, "-" if name == "adamw" else str(-rank), row["state"], f"{state:.2f}",
            cell("between"), cell("between", "host_ms"), cell("between", "floor_ms"),
            cell("between", "floor_flop_ms"), cell("refresh"),
            cell("between", "ratio", ".2f"), cell("with-refreshes", "ratio", ".2f"),
        ])  # fmt: skip
    heads = [
        "method", "rank", "states", "GiB", "ms a step", "of the host", "floor: bytes",
        "floor: flops", "a step that refreshes all", "to AdamW", "with refreshes",
    ]  # fmt: skip
    return table(heads, lines)


def fits(rows: list[Row]) -> str:
    """Show which trainings of 7B fitted a card."""
    lines = []
    for row in rows:
        card = f"{row['card']} GiB" if int(row["card"]) else "no cap"
        sizes = (row["predicted_peak"], row["peak_allocated"], row["peak_reserved"])
        trained = row["outcome"] == "trained"
        lines.append([
            COMPARED[row["method"]].label, card, row["rank"] if trained else "-", row["batch"],
            *(f"{int(size) / GIB:.2f}" for size in sizes),
            f"{float(row['tokens_per_s']):.0f}" if trained else row["outcome"],
            f"{row['loss_first']} - {row['loss_last']}" if trained else "-",
        ])  # fmt: skip
    heads = [
        "method", "card", "rank", "texts a step", "planned", "allocated", "reserved",
        "tokens/s", "loss, first and 20th step",
    ]  # fmt: skip
    return table(heads, lines)


TABLES = {
    "planned-gpu": table_of("planner_gpu.csv", planned),
    "steps-gpu": table_of("step_time_h200.csv", steps),
    "fits-gpu": table_of("fit_7b.csv", fits),
}
