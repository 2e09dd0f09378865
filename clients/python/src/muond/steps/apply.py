"""The one formula of a trainer, on numpy arrays: W <- row_scale ⊙ ((1 - decay) · W + scale · data)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..wire.bfloat16 import from_bfloat16, to_bfloat16
from ..wire.blocks import decode
from ..wire.dtype import BLOCKS
from .parameter import Bound
from .updates import Bytes, Update

# Elements at a time: what lies between the operations stays in the second-level cache.
_BLOCK = 1 << 15

Weights = npt.NDArray[Any]


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """bfloat16 as its bits, uint16, or as the dtype of that name which ml_dtypes (JAX) brings."""
    return dtype == np.uint16 or dtype.name == "bfloat16"


def apply_update(weights: Weights, update: Update) -> None:
    """Applies an update in place: float64, float32, float16, or bfloat16 (see ``is_bfloat16``), of any strides.

    The bits are those of docs/protocol.md ("Arithmetic"): factors, products and sum are rounded one by one, to float64
    for float64 weights, else to float32, and the result to the weights' own type.
    """
    if not weights.flags.c_contiguous:
        copy = np.ascontiguousarray(weights)
        apply_update(copy, update)
        weights[...] = copy
        return
    flat = weights.reshape(-1)
    sent, dtype = _in_elements(update)
    wide = np.float64 if weights.dtype == np.float64 else np.float32
    for first in range(0, len(flat), _BLOCK):
        block = slice(first, min(first + _BLOCK, len(flat)))
        values = _read(flat[block], wide)
        values *= wide(1 - update.decay)
        if sent is not None:
            values += np.multiply(widen(sent, dtype, block), update.scale, dtype=wide)
        if update.row_scale is not None:
            values *= _factors(update.row_scale, update.parameter, block)
        _write(flat[block], values)


def _in_elements(update: Update) -> tuple[Bytes | None, str]:
    """The bytes of an update and the dtype of their elements: what travels in blocks is decoded."""
    dtype, data = update.parameter.update_dtype, update.data
    if data is None or dtype not in BLOCKS:
        return data, dtype
    return decode(data, dtype, update.parameter.size).view(np.uint8), "float32"


def widen(data: Bytes, dtype: str, block: slice = slice(None)) -> npt.NDArray[np.float32]:
    """Elements of a tensor's bytes as float32."""
    if dtype == "float32":
        return data.view(np.float32)[block]
    if dtype == "bfloat16":
        return from_bfloat16(data.view(np.uint16)[block])
    return data.view(np.float16)[block].astype(np.float32)


def _read(block: Weights, wide: type[np.floating[Any]]) -> npt.NDArray[Any]:
    if is_bfloat16(block.dtype):
        return from_bfloat16(block.view(np.uint16))
    return block.astype(wide)


def _write(block: Weights, values: npt.NDArray[Any]) -> None:
    if is_bfloat16(block.dtype):
        block.view(np.uint16)[...] = to_bfloat16(values)
    else:
        block[...] = values


def _factors(row_scale: npt.NDArray[np.float32], parameter: Bound, block: slice) -> npt.NDArray[np.float32]:
    ranges = parameter.ranges
    elements = np.arange(block.start, block.stop) if ranges is None else ranges.elements(block)
    return np.take(row_scale, elements // (parameter.whole // len(row_scale)))
