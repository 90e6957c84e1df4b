"""Clipping that a loop or trainer asks for, where layer-wise updates have freed the gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from ..parts.checks import is_real

CLIPPERS = frozenset(
    {"clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "clip_gradients"}
)
"""Functions of torch and of trainers that clip what is in `.grad`."""


def asked_by_trainer(closure: Callable[[], Any] | None) -> tuple[float | None, str | None]:
    """Return the largest norm that a trainer is told to clip to, and the setting that says so.

    Lightning gives its module to the closure. The norm is None where it clips otherwise.
    """
    given = closure.args if isinstance(closure, partial) else ()
    for module in given:
        trainer = getattr(module, "_trainer", None)
        value: Any = getattr(trainer, "gradient_clip_val", None)
        if is_real(value) and value > 0:
            by_norm = getattr(trainer, "gradient_clip_algorithm", None) in (None, "norm")
            return (float(value) if by_norm else None), f"gradient_clip_val={value}"
    return None, None


def clipper_called() -> str | None:
    """Return the name of a clipping function that a caller up the stack uses; None without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if found := CLIPPERS.intersection(frame.f_code.co_names):
            return min(found)
        frame = frame.f_back
    return None
