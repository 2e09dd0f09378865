"""The elements of a tensor that one member of a run sends and receives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class Ranges:
    """Ranges ``[start, stop)`` of elements in C order, sorted and apart.

    A member has their elements one behind the other: a position counts those, an offset all of the tensor.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in ranges]
        # How many elements there are before each range, and in all.
        self._before = [0]
        for start, stop in ranges:
            self._before.append(self._before[-1] + stop - start)

    @property
    def size(self) -> int:
        """How many elements they have."""
        return self._before[-1]

    def offset(self, position: int, unit: int) -> int:
        """Where the byte at a position lies in the tensor, whose elements have ``unit`` bytes; 0 where there is none."""
        if not self._starts:
            return 0
        element, within = divmod(position, unit)
        # Behind the last byte that is the end of the last range.
        index = min(bisect_right(self._before, element) - 1, len(self._starts) - 1)
        return (self._starts[index] + element - self._before[index]) * unit + within

    def elements(self, block: slice) -> npt.NDArray[np.int64]:
        """Which elements of the tensor lie at the positions of a block."""
        positions = np.arange(block.start, block.stop)
        index = np.searchsorted(self._before[1:], positions, side="right")
        shift: npt.NDArray[np.int64] = np.array(self._starts, np.int64) - np.array(self._before[:-1], np.int64)
        return positions + shift[index]
