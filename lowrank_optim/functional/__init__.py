"""The operations of the optimizers in plain torch, written to be read.

Every operation that has a kernel has its reference here, under the same name and signature.
Matrices are seen with the projected axis last: `param` and `grad` are `(..., rows, cols)`, `low` is
`(..., rows, rank)`.
"""

from .bases import canonical_signs, dct_basis
from .moments import adam_moments, rotate_moments, select_moment
from .products import compute_dtype, peaks, product, product_t, row_chunks, row_norms, usable
from .rounding import generator, round_into_, stochastic_round
from .write import add_scaled_, lift_write

__all__ = [
    "adam_moments",
    "add_scaled_",
    "canonical_signs",
    "compute_dtype",
    "dct_basis",
    "generator",
    "lift_write",
    "peaks",
    "product",
    "product_t",
    "rotate_moments",
    "round_into_",
    "row_chunks",
    "row_norms",
    "select_moment",
    "stochastic_round",
    "usable",
]
