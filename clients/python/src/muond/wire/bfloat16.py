"""bfloat16 as the upper half of float32: numpy has no such dtype, so its bits are uint16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounds to nearest, ties to even. A NaN stays a NaN, what is beyond the largest bfloat16 becomes infinite."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # Rounding up a NaN whose upper bits are all ones would carry into the sign.
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Exact: every bfloat16 is a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
