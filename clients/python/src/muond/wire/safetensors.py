"""The safetensors format: a header in JSON, then the tensors' bytes."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}
# The header of a run with 100,000 parameters takes some 30 MB.
HEADER_BYTES = 1 << 27


class Described(NamedTuple):
    """A tensor of a file: its bytes are ``begin`` to ``end`` of what follows the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(text: bytes) -> tuple[list[Described], dict[str, str]]:
    """The tensors in the order of their bytes, and the metadata. Raises ValueError: they must tile the body."""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"a safetensors header is a map, this one is a {type(header).__name__}")  # noqa: TRY004
    metadata = header.pop("__metadata__", {})
    described = _describing()
    tensors = [described(name, entry) for name, entry in header.items()]
    tensors.sort(key=attrgetter("begin"))
    covered = 0
    for tensor in tensors:
        if tensor.begin != covered:
            raise ValueError(f"tensor '{tensor.name}' begins at byte {tensor.begin}, expected {covered}")
        covered = tensor.end
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _describing() -> Callable[[str, Any], Described]:
    """Reads the entries of one header, in which most tensors have the shape of others."""

    @lru_cache(maxsize=None, typed=True)
    def size_of(dtype: str, *shape: int) -> int:
        return math.prod(map(operator.index, shape)) * BYTES[dtype]

    def described(name: str, entry: Any) -> Described:
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = map(operator.index, entry["data_offsets"])
            expected = size_of(dtype, *shape)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tensor '{name}' is described as {entry!r}") from error
        if end - begin != expected:
            raise ValueError(f"tensor '{name}' has {end - begin} bytes, {dtype} of shape {list(shape)} has {expected}")
        return Described(name, dtype, shape, begin, end)

    return described


def write_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The first bytes of a file with these tensors ({name: (dtype, shape)}) in this order, and how many bytes follow."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False).encode()
    # The tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, position
