"""A parameter in use: what the trainer declared and the service confirmed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..error import ErrorFields, MuondError
from .ranges import Ranges

BYTES_PER_ELEMENT: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Bound:
    """``shape`` is the whole tensor's, ``size`` the elements of it that are sent and received; the dtypes are settled."""

    index: int
    name: str
    shape: tuple[int, ...]
    gradient_dtype: str
    update_dtype: str
    ranges: Ranges | None = None
    """None for all elements."""

    @cached_property
    def whole(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @cached_property
    def size(self) -> int:
        return self.whole if self.ranges is None else self.ranges.size

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of an array with the elements that are sent and received."""
        return self.shape if self.ranges is None else (self.size,)

    def gradient_offset(self, position: int) -> int:
        """Where the byte at a position of the gradient lies in the whole tensor."""
        unit = BYTES_PER_ELEMENT[self.gradient_dtype]
        return position if self.ranges is None else self.ranges.offset(position, unit)

    def update_offset(self, position: int) -> int:
        """Where the byte at a position of the update lies in the whole tensor."""
        unit = BYTES_PER_ELEMENT[self.update_dtype]
        return position if self.ranges is None else self.ranges.offset(position, unit)

    @cached_property
    def gradient_bytes(self) -> int:
        return self.size * BYTES_PER_ELEMENT[self.gradient_dtype]

    @cached_property
    def update_bytes(self) -> int:
        return self.size * BYTES_PER_ELEMENT[self.update_dtype]


def bind(declarations: Sequence[Mapping[str, Any]]) -> list[Bound]:
    """The parameters of ``open``, which the run has accepted. Raises MuondError DTYPE_UNSUPPORTED."""
    return [
        Bound(
            index=index,
            name=declaration["name"],
            shape=tuple(declaration["shape"]),
            gradient_dtype=_dtype(declaration.get("gradient_dtype", "float32")),
            update_dtype=_dtype(declaration.get("update_dtype", "float32")),
            ranges=None if declaration.get("ranges") is None else Ranges(declaration["ranges"]),
        )
        for index, declaration in enumerate(declarations)
    ]


def sizes_of(declarations: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Bytes of each parameter's gradient, and of each one's update. A dtype that is not known is the service's to refuse."""
    counts = [math.prod(declaration["shape"]) for declaration in declarations]

    def of(key: str) -> list[int]:
        bytes_per_element = [BYTES_PER_ELEMENT.get(declaration[key], 4) for declaration in declarations]
        return [count * size for count, size in zip(counts, bytes_per_element, strict=True)]

    return of("gradient_dtype"), of("update_dtype")


def _dtype(name: str) -> str:
    if name in BYTES_PER_ELEMENT:
        return name
    raise MuondError("DTYPE_UNSUPPORTED", f"a parameter has dtype '{name}', which this client does not know")


def check_bytes(parameter: Bound, count: int) -> None:
    """Raises MuondError SHAPE_MISMATCH unless a gradient of ``count`` bytes is one of this parameter."""
    if count == parameter.gradient_bytes:
        return
    expected = f"{parameter.gradient_dtype} of shape {list(parameter.held)} has {parameter.gradient_bytes}"
    message = f"the gradient of '{parameter.name}' has {count} bytes, {expected}"
    raise MuondError("SHAPE_MISMATCH", message, ErrorFields(parameter=parameter.index))
