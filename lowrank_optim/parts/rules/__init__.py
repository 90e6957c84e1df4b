"""Rules that turn gradients into a direction, at any size: projected or whole."""

from ..protocols import Rule
from .adam import Adam
from .momentum import SGDM, Lion
from .muon import Muon, NorMuon, Orthogonal
from .row_column import RowColumnScaled
from .row_normalized import RowNormalized

RULES: dict[str, Rule] = {
    "adam": Adam(),
    "lion": Lion(),
    "sgdm": SGDM(),
    "muon": Muon(),
    "normuon": NorMuon(),
    "orthogonal": Orthogonal(),
    "row_column_scaled": RowColumnScaled(),
    "row_normalized": RowNormalized(),
}

__all__ = [
    "RULES",
    "SGDM",
    "Adam",
    "Lion",
    "Muon",
    "NorMuon",
    "Orthogonal",
    "RowColumnScaled",
    "RowNormalized",
    "Rule",
]
