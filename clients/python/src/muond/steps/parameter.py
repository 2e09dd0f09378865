"""A parameter in use: what the trainer declared and the service confirmed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..error import ErrorFields, MuondError
from ..wire.dtype import is_dtype, tensor_bytes
from .ranges import Ranges


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
        return position if self._gradient_ranges is None else self._gradient_ranges.offset(position)

    def update_offset(self, position: int) -> int:
        """Where the byte at a position of the update lies in the whole tensor."""
        return position if self._update_ranges is None else self._update_ranges.offset(position)

    @cached_property
    def _gradient_ranges(self) -> Ranges | None:
        """The bytes of the gradient that are sent; None for all of them."""
        return None if self.ranges is None else self.ranges.in_bytes(self.gradient_dtype)

    @cached_property
    def _update_ranges(self) -> Ranges | None:
        return None if self.ranges is None else self.ranges.in_bytes(self.update_dtype)

    @cached_property
    def gradient_bytes(self) -> int:
        return tensor_bytes(self.gradient_dtype, self.size)

    @cached_property
    def update_bytes(self) -> int:
        return tensor_bytes(self.update_dtype, self.size)


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
    """Bytes of each gradient and of each update that travel. A dtype that is not known is the service's to refuse."""
    counts = [
        math.prod(declaration["shape"]) if declaration.get("ranges") is None else Ranges(declaration["ranges"]).size
        for declaration in declarations
    ]

    def of(key: str) -> list[int]:
        dtypes = [declaration[key] if is_dtype(declaration[key]) else "float32" for declaration in declarations]
        return [tensor_bytes(dtype, count) for dtype, count in zip(dtypes, counts, strict=True)]

    return of("gradient_dtype"), of("update_dtype")


def _dtype(name: str) -> str:
    if is_dtype(name):
        return name
    raise MuondError("DTYPE_UNSUPPORTED", f"a parameter has dtype '{name}', which this client does not know")


def check_bytes(parameter: Bound, count: int) -> None:
    """Raises MuondError SHAPE_MISMATCH unless a gradient of ``count`` bytes is one of this parameter."""
    if count == parameter.gradient_bytes:
        return
    expected = f"{parameter.gradient_dtype} of shape {list(parameter.held)} has {parameter.gradient_bytes}"
    message = f"the gradient of '{parameter.name}' has {count} bytes, {expected}"
    raise MuondError("SHAPE_MISMATCH", message, ErrorFields(parameter=parameter.index))
