"""What values the entries of a state may have: one kind for each sort of entry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What a checkpoint may hold under a key.

    Attributes:
        wanted: what it may hold, in words, for a message.
        least, most: bounds, themselves allowed.
        integral: whether only whole numbers are allowed.
        endless: whether infinity is allowed.
        columns: whether the values number columns: below `cols`, and each above the one before it.
    """

    wanted: str
    least: float = -math.inf
    most: float = math.inf
    integral: bool = False
    endless: bool = False
    columns: bool = False

    def allows(self, values: Tensor, cols: int) -> bool:
        """Return whether all values are of this kind; most kinds take one pass over them.

        Args:
            values: real, not on "meta".
            cols: length of the projected axis.
        """
        if not values.numel():
            return True
        values = values.detach()
        values = values.byte() if values.dtype == torch.bool else values
        low, high = torch.stack(torch.aminmax(values)).tolist()
        if not self.least <= low <= high <= (cols - 1 if self.columns else self.most):
            return False
        if not self.endless and math.inf in (-low, high):
            return False
        if self.integral and not bool((values == values.floor()).all()):
            return False
        return not self.columns or bool((values.diff(dim=-1) > 0).all())


NUMBER = Kind("finite")
NOT_NEGATIVE = Kind("finite and not negative", 0)
NORM = Kind("not negative, or infinity before the first", 0, endless=True)
UNIT = Kind("columns of length 1, with values from -1 to 1", -1.01, 1.01)
"""A basis; bfloat16 rounds the length of a column by up to half a per cent."""
FLAG = Kind("true or false", 0, 1, integral=True)
COUNT = Kind("a whole number from 0 to 2147483647", 0, 2**31 - 1, integral=True)
"""Kernels and random draws take counts of 32 bits."""
COLUMNS = Kind("different columns in ascending order", 0, integral=True, columns=True)
