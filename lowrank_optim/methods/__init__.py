"""Our own method and the published ones as settings of one engine; no logic.

Each also takes the settings of `LowRank` that all methods share, see `_common.Common`; methods
that leave the feed open take `feed` too. Memory is given for a matrix of m rows and n columns,
m >= n, at rank r.
"""

from .alice import CompensatedAdamW
from .apollo import ApolloAdamW
from .conda import CondaW
from .dct import DCTAdamW
from .fira import FiraAdamW
from .frugal import FrugalAdamW
from .galore import GaLoreAdamW
from .ldadam import LDAdamW
from .lowrank import LowRankAdamW
from .muon import MuonW
from .normuon import NorMuonW
from .racs import RACS
from .rmnp import RMNPW
from .trion import TrionW

__all__ = [  # noqa: RUF022 - in the order that `cite` lists them in
    "LowRankAdamW",
    "GaLoreAdamW",
    "DCTAdamW",
    "FiraAdamW",
    "FrugalAdamW",
    "ApolloAdamW",
    "LDAdamW",
    "TrionW",
    "MuonW",
    "NorMuonW",
    "RMNPW",
    "CondaW",
    "CompensatedAdamW",
    "RACS",
]
