"""How much memory a card has."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from ..parts.checks import bytes_in
from .models import PlanError

GIB = 2**30

MOST = 2**50
"""Bytes of the largest card."""

RESERVE = GIB
"""Bytes of a card that are taken to be out of reach.

CUDA's context and its libraries' workspaces take some half of it; the other half is for holes
between the blocks that torch's allocator hands out, which no count of tensors sees.
"""

CARDS = {
    "RTX 3060": 11.6,
    "RTX 3080": 9.6,
    "RTX 3090": 23.6,
    "RTX 4060 Ti 16GB": 15.6,
    "RTX 4080": 15.6,
    "RTX 4090": 23.6,
    "RTX 5090": 31.3,
    "RTX A6000": 47.4,
    "T4": 14.5,
    "V100 16GB": 15.7,
    "V100 32GB": 31.7,
    "A10G": 22.0,
    "A30": 23.5,
    "A40": 44.3,
    "A100 40GB": 39.3,
    "A100 80GB": 79.1,
    "L4": 22.0,
    "L40S": 44.3,
    "H100 80GB": 79.1,
    "H200": 139.7,
    "B200": 178.0,
}
"""GiB that torch reports (`total_memory`): less than the nominal, by what the driver keeps and, on
data-centre cards with GDDR, by error correction. Rounded down; drivers differ by some 0.1 GiB."""


class Card(NamedTuple):
    """A card by name, with all the bytes it shows."""

    name: str
    total: int

    @property
    def usable(self) -> int:
        """Bytes that tensors may take."""
        return max(0, self.total - RESERVE)


def card_of(text: str) -> Card:
    """Return the card of a name ("RTX 4090", "a100-80gb") or of a size ("24GiB", "24GB").

    Raises:
        PlanError: it is neither, and the message has the nearest names; or no card has that size.
    """
    size = bytes_in(text)
    if size is not None:
        if not 0 < size <= MOST:
            raise PlanError(f"a card of '{text}': wanted more than nothing, and at most 1024 TiB")
        return Card(text.strip(), size)
    plain = {_plain(name): name for name in CARDS}
    wanted = _plain(text)
    found = [plain[wanted]] if wanted in plain else [
        name for key, name in plain.items() if wanted and wanted in key.removesuffix("gb")
    ]  # fmt: skip
    if len(found) == 1:
        return Card(found[0], int(CARDS[found[0]] * GIB))
    near = found or [
        plain[key] for key in difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5)
    ]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(CARDS)};"
    raise PlanError(f"unknown card '{text}': {hint} A size such as 24GiB will do too")


def _plain(name: str) -> str:
    """Return a name without the words and signs that people may leave out or add."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
