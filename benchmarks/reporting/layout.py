"""How tables are laid out."""

from __future__ import annotations

NOTHING = "Not measured yet."


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))
