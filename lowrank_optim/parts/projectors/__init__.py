"""Projectors: how a gradient is mapped to a small one and back."""

from ..protocols import Projector
from ._basis import peaks_of
from .blocks import Blocks
from .columns import Columns
from .dct import DCT
from .identity import Identity
from .power import Power
from .random import Random
from .svd import SVD

PROJECTORS: dict[str, Projector] = {
    "svd": SVD(),
    "power": Power(),
    "dct": DCT(),
    "random": Random(),
    "columns": Columns(),
    "blocks": Blocks(),
    "identity": Identity(),
}

__all__ = [
    "DCT",
    "PROJECTORS",
    "SVD",
    "Blocks",
    "Columns",
    "Identity",
    "Power",
    "Projector",
    "Random",
    "peaks_of",
]
