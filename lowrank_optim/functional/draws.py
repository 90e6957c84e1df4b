"""What random bits are for: kinds of draws, of which no two share bits.

A kind is the top three bits of a counter of Philox, see `random_bits`; the kernels have the same
numbers.
"""

from __future__ import annotations

KINDS = 8
"""Kinds that there is room for in a counter."""

ALLOTTED: dict[str, range] = {}
"""The kinds of each purpose."""


def allot(purpose: str, count: int) -> range:
    """Return the next kinds that nothing else has, and note what they are for.

    Raises:
        ValueError: there are no more, or the purpose has some already.
    """
    first = max((kinds.stop for kinds in ALLOTTED.values()), default=0)
    if purpose in ALLOTTED or first + count > KINDS:
        raise ValueError(f"no {count} kinds of random bits are left for {purpose!r}")
    ALLOTTED[purpose] = range(first, first + count)
    return ALLOTTED[purpose]


WEIGHT = allot("weights", 1)[0]
MOMENTS = allot("moments", 2)
CARRIED = allot("moments carried into a new subspace", 2)
FED = allot("what a feed carries", 2)
EXP_AVG, EXP_AVG_SQ = MOMENTS
