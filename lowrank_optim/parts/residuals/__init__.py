"""Residuals: what becomes of the part of the gradient that the projection drops.

Notation: G the gradient, R = G P its projection, N the rule's direction on R, k the group's
`scale`, all with the projected axis last; a row norm is over that axis.
"""

from ..protocols import Residual
from .compensated import Compensated
from .drop import Drop
from .grad_scaled import GradScaled
from .norm_scaled import NormScaled
from .state_free import StateFree

RESIDUALS: dict[str, Residual] = {
    "drop": Drop(),
    "norm_scaled": NormScaled(),
    "state_free": StateFree(),
    "grad_scaled": GradScaled(),
    "compensated": Compensated(),
}

__all__ = [
    "RESIDUALS",
    "Compensated",
    "Drop",
    "GradScaled",
    "NormScaled",
    "Residual",
    "StateFree",
]
