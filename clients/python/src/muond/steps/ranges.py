"""The elements of a tensor that one member of a run sends and receives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..wire.dtype import tensor_bytes


class Ranges:
    """Ranges ``[start, stop)`` of elements in C order, sorted and apart.

    A member has their elements one behind the other: a position counts those, an offset all of the tensor.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = ranges
        self._starts = [start for start, _ in ranges]
        # How many elements there are before each range, and in all.
        self._before = [0]
        for start, stop in ranges:
            self._before.append(self._before[-1] + stop - start)

    @property
    def size(self) -> int:
        """How many elements they have."""
        return self._before[-1]

    def in_bytes(self, dtype: str) -> Ranges:
        """The bytes of these elements in a tensor that travels as ``dtype``; blocks of one are not cut."""
        return Ranges([(tensor_bytes(dtype, start), tensor_bytes(dtype, stop)) for start, stop in self._ranges])

    def offset(self, position: int) -> int:
        """Which element of the tensor lies at a position; 0 where there is none."""
        if not self._starts:
            return 0
        # Behind the last one that is the end of the last range.
        index = min(bisect_right(self._before, position) - 1, len(self._starts) - 1)
        return self._starts[index] + position - self._before[index]

    def elements(self, block: slice) -> npt.NDArray[np.int64]:
        """Which elements of the tensor lie at the positions of a block."""
        positions = np.arange(block.start, block.stop)
        index = np.searchsorted(self._before[1:], positions, side="right")
        shift: npt.NDArray[np.int64] = np.array(self._starts, np.int64) - np.array(self._before[:-1], np.int64)
        return positions + shift[index]
