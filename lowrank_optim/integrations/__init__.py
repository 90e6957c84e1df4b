"""Ways into trainers; each module imports its framework only when it is called."""

from __future__ import annotations

import importlib.util


def require(*modules: str, extra: str) -> None:
    """Check that optional modules are installed.

    Raises:
        ImportError: one is missing; the message names the extra that brings it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} missing: pip install "lowrank-optim[{extra}]"')
