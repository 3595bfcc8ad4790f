"""Ranges of numbers: what they hold, and how they are written."""

import math

import numpy as np
import pytest

from mpq_jax.checks import ranges
from mpq_jax.checks.ranges import Range


@pytest.mark.parametrize(
    ("wanted", "inside", "outside"),
    [
        (ranges.FRACTION, (0, 0.5, 1, np.float32(0.1), np.int64(1)), (-1e-9, 1.01)),
        (ranges.BELOW_ONE, (0, 0.999), (1, 1.0, -0.1)),
        (ranges.SHARE, (1e-9, 1), (0, 0.0, 1.1)),
        (ranges.POSITIVE, (1e-30, 1e30), (0, -1)),
        (ranges.COUNT, (1, 2**40, np.int32(3)), (0, 1.0, 1.5, -2)),
        (Range(1, whole=True, optional=True), (None, 1), (0, 0.5)),
    ],
)
def test_ranges_hold_the_numbers_between_their_ends(wanted, inside, outside):
    assert all(number in wanted for number in inside)
    never = (math.nan, math.inf, -math.inf, 10**400, True, "1", [1], 1j)
    assert not any(number in wanted for number in (*outside, *never))
    assert (None in wanted) == wanted.optional


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (ranges.FRACTION, "a number from 0 to 1"),
        (ranges.BELOW_ONE, "a number of at least 0 and below 1"),
        (ranges.SHARE, "a number above 0 and at most 1"),
        (ranges.COUNT, "an integer, 1 or more"),
        (ranges.SEED, "an integer from 0 to 4294967295"),
        (ranges.POSITIVE, "a number above 0"),
        (Range(2, 16, whole=True, optional=True), "an integer from 2 to 16, or None"),
    ],
)
def test_ranges_are_written_in_words(wanted, text):
    assert str(wanted) == text


def test_the_first_wrong_number_is_named_with_its_value():
    wanted = {"rate": ranges.NOT_NEGATIVE, "bits": Range(2, 8, whole=True)}
    ranges.check({"rate": 0.0, "bits": (8, 2), "other": "text"}, wanted)
    ranges.check({}, wanted)
    with pytest.raises(ValueError, match=r"^config.rate is -1; wanted a number, 0 or more$"):
        ranges.check({"rate": -1, "bits": (1,)}, wanted, prefix="config.")
    with pytest.raises(ValueError, match=r"bits is \[8, 1\]; wanted an integer from 2 to 8, each"):
        ranges.check({"bits": [8, 1]}, wanted)
