"""A parameter as a trainer declares it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .steps.apply import Weights


class Member(NamedTuple):
    """Which member of a run a connection is: ``rank`` counts within a replica, which has a whole model."""

    rank: int
    world_size: int
    replica: int = 0
    replicas: int = 1

    def declaration(self) -> dict[str, int]:
        """What goes into the open frame."""
        own = {"rank": self.rank, "world_size": self.world_size}
        return own if self.replicas == 1 else {**own, "replica": self.replica, "replicas": self.replicas}


class Quorum(NamedTuple):
    """When a step may be closed without all replicas: with all that are connected, or after a deadline with most of them."""

    min_replicas: int
    """Fewer never close a step."""
    deadline_seconds: float
    """Counted from the first member that has ended its part of the step."""


@dataclass(frozen=True)
class Parameter:
    """A parameter as the trainer declares it: what ``open`` sends, and the array that its updates are applied to, in place.

    With ``ranges`` the array has one dimension, and their elements alone; so have gradients.
    """

    name: str
    group: str
    data: Weights | None = None
    """float64, float32, float16, or bfloat16 as uint16 bits. None with an ``apply`` of your own; then ``shape`` must be there."""
    shape: Sequence[int] | None = None
    """As torch stores it, rows first; default: that of ``data``."""
    gradient_dtype: str = "float32"
    update_dtype: str = "float32"
    split: Sequence[int] | None = None
    """Rows of each block that is its own matrix (fused QKV)."""
    heads: int | None = None
    matrices: str | None = None
    """``flatten`` or ``batch``, for more than two dimensions with Muon."""
    ranges: Sequence[tuple[int, int]] | None = None
    """[start, stop) of the elements in C order that this member of the run sends and receives; default: all. ``shape`` is that of
    the whole tensor."""

    def declaration(self) -> dict[str, Any]:
        """What goes into the open frame."""
        own = None if self.data is None or self.ranges is not None else self.data.shape
        shape = self.shape if self.shape is not None else own
        if shape is None:
            raise ValueError(f"parameter '{self.name}' has neither data nor a shape")
        held = tuple(shape) if self.ranges is None else (sum(stop - start for start, stop in self.ranges),)
        if self.data is not None and held != self.data.shape:
            raise ValueError(f"parameter '{self.name}' has shape {list(held)}, its data has {list(self.data.shape)}")
        ranges = None if self.ranges is None else [[int(start), int(stop)] for start, stop in self.ranges]
        optional = {"split": self.split, "heads": self.heads, "matrices": self.matrices, "ranges": ranges}
        return {
            "name": self.name,
            "shape": [int(size) for size in shape],
            "group": self.group,
            "gradient_dtype": self.gradient_dtype,
            "update_dtype": self.update_dtype,
            **{key: value for key, value in optional.items() if value is not None},
        }
