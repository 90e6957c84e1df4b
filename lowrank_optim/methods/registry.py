"""All methods by name: what planner, demo, `cite`, benchmarks and the tests' table read."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .. import methods
from .record import Method, Rates

BASELINES = {
    "adamw": Method("adamw", "AdamW", rates=Rates(1e-3, 1e-2), in_planner=True, in_demo=True),
    "adamw8bit": Method("adamw8bit", "AdamW 8-bit", in_planner=True),
}
"""The baselines: torch's AdamW and bitsandbytes' AdamW8bit."""


def records() -> Iterator[Method]:
    """Yield the record of each exported class: the `Method` of its file."""
    for name in methods.__all__:
        yield sys.modules[getattr(methods, name).__module__].METHOD


CITED = {method.name: method for method in records()}
"""Our methods, in the order of the bibliography."""

METHODS = {
    method.name: method
    for method in sorted(
        CITED.values(), key=lambda method: (method.whole, method.default_gap is None)
    )
}
"""Our methods in the order of tables: first the ones that project, then the others."""

COMPARED = {**BASELINES, **METHODS}
"""All of them, baselines first."""


def shown_first(which: str) -> dict[str, Method]:
    """Return all methods, first the ones that `which` ("in_planner", "in_demo") is true of."""
    ordered = sorted(COMPARED.values(), key=lambda method: not getattr(method, which))
    return {method.name: method for method in ordered}
