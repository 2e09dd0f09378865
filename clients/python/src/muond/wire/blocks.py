"""Tensors in blocks (docs/protocol.md), in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .bfloat16 import from_bfloat16, to_bfloat16
from .dtype import BLOCKS, SCALE_BYTES, tensor_bytes

Bytes = npt.NDArray[np.uint8]

# The scale of a block that holds NaN or Inf: with it every element of the block is NaN.
_NOT_FINITE = 0x7FC0


def encode(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """The bytes of float32 numbers in blocks: scale = bfloat16(max |x| / most), integer = round(x / scale)."""
    blocks = BLOCKS[dtype]
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    padded = np.zeros((-(-len(flat) // blocks.elements), blocks.elements), np.float32)
    padded.reshape(-1)[: len(flat)] = flat
    largest = np.abs(padded).max(axis=1, initial=0)
    scales = np.where(np.isfinite(largest), to_bfloat16(largest / np.float32(blocks.most)), np.uint16(_NOT_FINITE))
    wide = from_bfloat16(scales)[:, None]
    # Where the scale is 0 or NaN the integers are 0.
    quotients = np.divide(padded, wide, out=np.zeros_like(padded), where=wide > 0)
    integers = np.rint(quotients).clip(-blocks.most, blocks.most).astype(np.int8)
    data = np.empty((len(padded), tensor_bytes(dtype, blocks.elements)), np.uint8)
    data[:, :SCALE_BYTES] = scales.astype("<u2").view(np.uint8).reshape(-1, SCALE_BYTES)
    data[:, SCALE_BYTES:] = integers.view(np.uint8) if blocks.bits == 8 else _pairs(integers)
    return data.reshape(-1)[: tensor_bytes(dtype, len(flat))]


def decode(data: Bytes, dtype: str, elements: int) -> npt.NDArray[np.float32]:
    """So many elements, exactly: integer · scale. A scale that is NaN or Inf makes its elements NaN or Inf."""
    blocks = BLOCKS[dtype]
    count = -(-elements // blocks.elements)
    padded = np.zeros((count, tensor_bytes(dtype, blocks.elements)), np.uint8)
    padded.reshape(-1)[: len(data)] = data
    scales = from_bfloat16(np.ascontiguousarray(padded[:, :SCALE_BYTES]).view("<u2"))
    stored = padded[:, SCALE_BYTES:].view(np.int8)
    integers = stored if blocks.bits == 8 else np.stack([(stored << 4) >> 4, stored >> 4], axis=-1).reshape(count, -1)
    with np.errstate(invalid="ignore", over="ignore"):
        values: npt.NDArray[np.float32] = integers.astype(np.float32) * scales
    return values.reshape(-1)[:elements]


def _pairs(integers: npt.NDArray[np.int8]) -> Bytes:
    """Four bits each: of two elements the first has the lower ones."""
    patterns = integers.view(np.uint8)
    packed: Bytes = (patterns[:, ::2] & np.uint8(15)) | (patterns[:, 1::2] << np.uint8(4))
    return packed
