"""Row norms: what overflows, and the ratio phi."""

from __future__ import annotations

from torch import Tensor

from ...functional import Norms

TINY = 1e-8


def measured(norms: Norms) -> Norms:
    """Return the norms, with all three of a row set to 0 where one of them overflows.

    Such a row gets no more than the rule's own direction. In AdamW it would stand still too: an
    average of squares that overflows makes a step of 0.
    """
    over = (norms.grad + norms.low + norms.direction).isinf()
    return Norms(*(part.masked_fill(over, 0) for part in norms))


def phi_of(norms: Norms) -> Tensor:
    """Return |N_i| / (|R_i| + 1e-8) of each row."""
    return norms.direction / (norms.low + TINY)
