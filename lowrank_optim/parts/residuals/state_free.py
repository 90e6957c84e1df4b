"""FRUGAL's residual: a step without state on the dropped part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...functional import Norms, Want
from ..numbers import Number, check_numbers
from ..types import Group, Site, State, Update
from ._base import Stateless


@dataclass(frozen=True)
class StateFree(Stateless):
    """FRUGAL: update the rest without state.

    A = k N inside; outside, with D = G - R P^T: c sgn(D) (`form="sign"`), c D ("sgd") or nothing
    ("none").

    Args:
        form: "sign", "sgd" or "none".
        scale: c, the factor of the state-free part, relative to the learning rate;
            `state_free_scale` of a group.

    Raises:
        ValueError: an unknown form, or a negative scale.

    Reference: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
        for Scalable Training", arXiv 2411.07837.
    """

    form: str = "sign"
    scale: float = 1.0
    numbers: ClassVar[Mapping[str, Number]] = {"state_free_scale": Number.factor("scale")}

    def __post_init__(self) -> None:
        if self.form not in ("sign", "sgd", "none"):
            raise ValueError(f'state_free must be "sign", "sgd" or "none", got {self.form!r}')
        check_numbers(self)

    @property
    def want(self) -> Want:
        """The direction, and the projected gradient if the rest is used."""
        return Want(low=self.form != "none", norms=False)

    def update(self, norms: Norms | None, state: State, site: Site, group: Group) -> Update:
        """Return the factors k of N and c of the sign, or k of N, c of G and -c of R."""
        if self.form == "sign":
            return Update(direction=group["scale"], sign=group["state_free_scale"])
        if self.form == "sgd":
            c: float = group["state_free_scale"]
            return Update(direction=group["scale"], low=-c, grad=c)
        return Update(direction=group["scale"])
