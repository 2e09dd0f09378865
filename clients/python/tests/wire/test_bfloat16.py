"""Rounding to bfloat16 against its definition in float64: the nearest, ties to even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muond.wire.bfloat16 import from_bfloat16, to_bfloat16


def _bits(value: float) -> int:
    return int(to_bfloat16(np.array([value], np.float32))[0])


def _neighbours(value: np.float32) -> npt.NDArray[np.float32]:
    below = np.array([value], np.float32).view(np.uint32)[0] >> 16
    return from_bfloat16(np.array([below, below + 1], np.uint16))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127)))
def test_a_number_becomes_the_nearest_bfloat16_ties_to_even(value: float) -> None:
    exact = np.float32(value)
    rounded = from_bfloat16(to_bfloat16(np.array([exact])))[0]
    toward_zero, away = _neighbours(exact)
    distances = [abs(float(exact) - float(toward_zero)), abs(float(away) - float(exact))]
    if distances[0] != distances[1]:
        assert rounded == (toward_zero if distances[0] < distances[1] else away)
    else:
        assert _bits(value) % 2 == 0


def test_every_bfloat16_survives_the_way_there_and_back() -> None:
    bits = np.arange(0x10000, dtype=np.uint16)
    back = to_bfloat16(from_bfloat16(bits))
    finite = ~np.isnan(from_bfloat16(bits))
    assert np.array_equal(back[finite], bits[finite])
    assert np.isnan(from_bfloat16(back[~finite])).all()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(0x7FFFFFFF, 0x7FFF), (0xFFFFFFFF, 0xFFFF), (0x7F800001, 0x7FC0), (0x7F7FFFFF, 0x7F80), (0x7F800000, 0x7F80)],
)
def test_nan_stays_nan_and_the_largest_float_becomes_infinite(pattern: int, expected: int) -> None:
    value = np.array([pattern], np.uint32).view(np.float32)
    assert to_bfloat16(value)[0] == expected
