"""The tables of what a step takes on a CPU, from the csv files beside the ledger."""

from __future__ import annotations

from .gpu import Row, table_of
from .layout import table


def steps(rows: list[Row]) -> str:
    """Show the times of a step beside fused AdamW's, of all parameters and of matrices alone."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["ms"]:
            found.setdefault(row["method"], {})[row["kind"]] = row

    def cell(row: Row | None, key: str, form: str) -> str:
        return f"{float(row[key]):{form}}" if row and row[key] else "-"

    lines = []
    for name, at in sorted(found.items(), key=lambda item: float(item[1]["alone"]["ratio"])):
        whole, alone = at.get("between") or at["refresh"], at["alone"]
        lines.append([
            name, cell(whole, "ms", ".0f"), cell(whole, "ratio", ".2f"), cell(alone, "ms", ".0f"),
            cell(alone, "ratio", ".2f"), cell(alone, "floor_flop_ms", ".0f"),
            cell(at.get("with-refreshes"), "ratio", ".2f"),
        ])  # fmt: skip
    heads = [
        "method", "all parameters, ms", "to fused AdamW", "matrices alone, ms", "to fused AdamW",
        "products of these, ms", "all, with refreshes, to fused AdamW",
    ]  # fmt: skip
    return f"{table(heads, lines)}\n\n{conditions(rows)}"


def conditions(rows: list[Row]) -> str:
    """Return what was stepped, and with how many threads."""
    first = next(row for row in rows if row["ms"])
    return (
        f"LLaMA {first['size']}, {first['layers']} layers, rank {first['rank']}, {first['dtype']}, "
        f"threads: {first['threads']}, products at {float(first['matmul_tflops']):.2f} TFLOP/s."
    )


def host(rows: list[Row]) -> str:
    """Show times of small parameters beside the loop's, and files and calls of a step."""
    last = {(row["kind"], row["subject"], row["optimizer"]): row for row in rows}
    lines = []
    for (kind, subject, optimizer), row in last.items():
        if kind == "trace":
            paths = (("files", "most_files"), ("calls", "most_calls"))
            wanted = [f"{row[key]} {key} (at most {row[most]})" for key, most in paths]
            cells = [row["note"] or ", ".join(wanted), "-", "-"]
            subject = f"five parameters, {subject}"
        else:
            cells = [f"{float(row['ms']):.3g} ms", row["ratio"], row["target"] or "-"]
        lines.append([subject, optimizer or "-", *cells])
    heads = ["what", "optimizer", "least", "to the first of its kind", "at most"]
    return table(heads, lines)


def sizes(rows: list[Row]) -> str:
    """Show how far a sample is off, and the loss with it, by its entries."""
    at: dict[str, dict[str, Row]] = {}
    for row in rows:
        at.setdefault(row["entries"], {})[row["kind"]] = row
    lines = []
    for entries, kinds in sorted(at.items(), key=lambda item: int(item[0])):
        seen, trained = kinds.get("error"), kinds.get("loss")
        cells = (
            [f"{100 * float(seen[key]):.2f} %" for key in ("error", "error_95", "bias")]
            if seen
            else ["-"] * 3
        )
        lines.append([entries, *cells, f"{float(trained['loss']):.3f}" if trained else "-"])
    first = rows[0]
    heads = ["entries", "mean error of the length", "95 % below", "bias", "NorMuon's loss"]
    return f"{table(heads, lines)}\n\n{first['task']}, {first['steps']} steps, one seed."


def lengths(rows: list[Row]) -> str:
    """Show what a length adds to a step, a line a method."""
    at: dict[str, dict[str, Row]] = {}
    for row in rows:
        at.setdefault(row["method"], {})[row["length"]] = row
    lines = []
    for name, by in at.items():
        more = int(by["adamw"]["state_bytes"]) / int(by["published"]["state_bytes"]) - 1
        ratios = [f"{float(by[length]['ratio_median']):.3f}" for length in ("rms", "adamw")]
        lines.append([name, f"{float(by['published']['ms_min']):.0f}", *ratios, f"{more:.2%}"])
    heads = ["method", "published, ms", "RMS 0.2", "AdamW's length", "state more, all parameters"]
    first = rows[0]
    about = f"LLaMA {first['size']}, {first['layers']} layers, rank {first['rank']}, float32."
    return f"{table(heads, lines)}\n\n{about}"


TABLES = {
    "length-cost": table_of("length_cost.csv", lengths),
    "sample-size": table_of("sample_size.csv", sizes),
    "steps-cpu": table_of("step_time_cpu.csv", steps),
    "host-time": table_of("host_time.csv", host),
}
