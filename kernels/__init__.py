"""Triton kernels, each under the name and signature of its plain reference in `functional`.

They import torch and triton and nothing of lowrank_optim, and run on CUDA devices, or interpreted
on a CPU where TRITON_INTERPRET=1 is set before triton is imported.
"""

from .bits import random_bits
from .blockwise import (
    dequantize_blockwise,
    dequantize_squares,
    quantize_blockwise,
    quantize_squares,
)
from .columns import move_columns
from .dct import dct_scores, supports
from .length import sample_moments, sign_squares
from .lift import lift_write
from .moments import adam_moments, adam_step
from .project import project_moments

__all__ = [
    "adam_moments",
    "adam_step",
    "dct_scores",
    "dequantize_blockwise",
    "dequantize_squares",
    "lift_write",
    "move_columns",
    "project_moments",
    "quantize_blockwise",
    "quantize_squares",
    "random_bits",
    "sample_moments",
    "sign_squares",
    "supports",
]
