"""What the norms of rows give."""

from __future__ import annotations

from torch import Tensor

from ..functional import Norms

TINY = 1e-8


def phi_of(norms: Norms) -> Tensor:
    """Return |N_i| / (|R_i| + 1e-8) of each row."""
    return norms.direction / (norms.low + TINY)
