"""The helper that stands for products of parameters."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from helpers.pairwise import pairwise


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_every_two_values_meet_in_few_rows(sizes):
    rows = pairwise(*map(range, sizes))
    for i, j in itertools.combinations(range(len(sizes)), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(range(sizes[i]), range(sizes[j])))
    longest = sorted(sizes)[-2:]
    assert longest[0] * longest[1] <= len(rows) <= 3 * longest[0] * longest[1]
    assert rows == pairwise(*map(range, sizes))
