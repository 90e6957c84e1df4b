"""The operations of the optimizers in plain torch, written to be read.

Every operation that has a kernel has its reference here, under the same name and signature.
Matrices are seen with the projected axis last: `param` and `grad` are `(..., rows, cols)`, `low` is
`(..., rows, rank)`.
"""

from .bases import canonical_signs, dct_basis, gram, orthonormal_
from .blockwise import (
    BLOCK,
    dequantize_blockwise,
    dequantize_squares,
    dynamic_map,
    quantize_blockwise,
    quantize_squares,
    square_map,
)
from .cosine import dct, dct_scores
from .draws import CARRIED, EXP_AVG, EXP_AVG_SQ, FED, MOMENTS, WEIGHT
from .factors import UNIT, Factor, Unit, down, down_some, drop_, is_index, lift_, reach
from .fourbit import BLOCK_4BIT, dequantize_4bit, quantize_4bit
from .length import has_rest, sample_columns, sample_moments, sign_squares, update_squares
from .moments import (
    adam,
    adam_some,
    bias_corrections,
    least_share,
    places_of,
    raise_square_,
    rotate_moments,
    select_moment,
)
from .orthogonal import newton_schulz
from .products import (
    NEAR,
    compute_dtype,
    inverse,
    peaks,
    product,
    product_t,
    row_chunks,
    row_norms,
    usable,
)
from .rounding import (
    Noise,
    generator,
    on_device,
    philox,
    random_bits,
    round_into_,
    stochastic_round,
    stream_of,
    upload,
)
from .steps import (
    Norms,
    Projected,
    Want,
    adam_moments,
    adam_step,
    bits_of,
    move_columns,
    project_moments,
)
from .stored import Stored, load, store
from .write import lift_write

__all__ = [
    "BLOCK",
    "BLOCK_4BIT",
    "CARRIED",
    "EXP_AVG",
    "EXP_AVG_SQ",
    "FED",
    "MOMENTS",
    "NEAR",
    "UNIT",
    "WEIGHT",
    "Factor",
    "Noise",
    "Norms",
    "Projected",
    "Stored",
    "Unit",
    "Want",
    "adam",
    "adam_moments",
    "adam_some",
    "adam_step",
    "bias_corrections",
    "bits_of",
    "canonical_signs",
    "compute_dtype",
    "dct",
    "dct_basis",
    "dct_scores",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_squares",
    "down",
    "down_some",
    "drop_",
    "dynamic_map",
    "generator",
    "gram",
    "has_rest",
    "inverse",
    "is_index",
    "least_share",
    "lift_",
    "lift_write",
    "load",
    "move_columns",
    "newton_schulz",
    "on_device",
    "orthonormal_",
    "peaks",
    "philox",
    "places_of",
    "product",
    "product_t",
    "project_moments",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_squares",
    "raise_square_",
    "random_bits",
    "reach",
    "rotate_moments",
    "round_into_",
    "row_chunks",
    "row_norms",
    "sample_columns",
    "sample_moments",
    "select_moment",
    "sign_squares",
    "square_map",
    "stochastic_round",
    "store",
    "stream_of",
    "update_squares",
    "upload",
    "usable",
]
