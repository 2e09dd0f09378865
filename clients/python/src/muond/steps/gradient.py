"""A numpy gradient as it travels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..error import ErrorFields, MuondError
from ..wire.bfloat16 import to_bfloat16
from ..wire.blocks import encode
from ..wire.dtype import BLOCKS
from .apply import is_bfloat16
from .parameter import Bound

_FORMS = {"float32": "<f4", "float16": "<f2"}


def bytes_of(gradient: npt.ArrayLike, parameter: Bound) -> memoryview:
    """The bytes of a gradient as its parameter's travel, in C order; its own memory if it is so already.

    Any float array is taken, and bfloat16 as uint16 bits. Raises MuondError SHAPE_MISMATCH, DTYPE_UNSUPPORTED.
    """
    array = np.asarray(gradient)
    if array.shape != parameter.held:
        raise _wrong("SHAPE_MISMATCH", parameter, f"shape {list(array.shape)}, expected {list(parameter.held)}")
    return _in_dtype(array, parameter).reshape(-1).view(np.uint8).data


def _in_dtype(array: npt.NDArray[Any], parameter: Bound) -> npt.NDArray[Any]:
    wanted = parameter.gradient_dtype
    if is_bfloat16(array.dtype):
        if wanted != "bfloat16":
            raise _wrong("DTYPE_UNSUPPORTED", parameter, f"dtype bfloat16, its gradient_dtype is {wanted}")
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise _wrong("DTYPE_UNSUPPORTED", parameter, f"dtype {array.dtype}, expected a float (or bfloat16 as uint16)")
    if wanted in BLOCKS:
        return encode(array.astype(np.float32, copy=False), wanted)
    if wanted == "bfloat16":
        return to_bfloat16(array.astype(np.float32, copy=False))
    return np.ascontiguousarray(array, _FORMS[wanted])


def _wrong(code: str, parameter: Bound, what: str) -> MuondError:
    message = f"the gradient of parameter '{parameter.name}' has {what}"
    return MuondError(code, message, ErrorFields(parameter=parameter.index))
