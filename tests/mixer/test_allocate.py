"""Sharing out tokens: exact sums, limits, proportion."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from mixer.allocate import largest_remainder, water_fill

weights = st.fractions(0, 1000, max_denominator=1000)


@given(st.integers(0, 10**13), st.lists(weights, min_size=1, max_size=12))
def test_largest_remainder_is_exact_and_within_one_token(total, shares):
    parts = largest_remainder(total, shares)
    if sum(shares) == 0:
        assert len(parts) == len(shares)
        return
    assert sum(parts) == total
    assert all(abs(p - total * s / sum(shares)) < 1 for p, s in zip(parts, shares, strict=True))


@given(st.integers(0, 10**13), st.lists(st.tuples(weights, st.integers(0, 10**13)), min_size=1, max_size=12))
def test_water_filling(total, cells):
    shares, limits = [c[0] for c in cells], [c[1] for c in cells]
    parts = water_fill(total, shares, limits)
    wanted = [limit if share else 0 for share, limit in cells]
    assert sum(parts) == min(total, sum(wanted))
    assert all(0 <= p <= w for p, w in zip(parts, wanted, strict=True))
    # One level for all: who is below the limit has the same tokens per weight as any other such, and no less than
    # those at their limits; a token more or less is rounding.
    below = [(p, s) for p, s, w in zip(parts, shares, wanted, strict=True) if s and p < w]
    level = max((Fraction(p - 1) / s for p, s in below), default=None)
    for p, s in below:
        assert Fraction(p + 1) / s >= level
    if below and sum(parts) == total:
        low = min(Fraction(p + 1) / s for p, s in below)
        assert all(Fraction(p - 1) / s <= low for p, s, w in zip(parts, shares, wanted, strict=True) if s and p == w)
