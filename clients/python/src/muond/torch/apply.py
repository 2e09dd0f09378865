"""Updates onto the model: W <- row_scale ⊙ ((1 - decay) · W + scale · data), a list of parameters at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from ..steps.updates import Update
from .settings import WIRE_DTYPES
from .slots import Slot

Views = dict[tuple[int, str, torch.Size], torch.Tensor]
"""The memory of updates as tensors, by its id, dtype and shape: a run uses the same memory in every step."""


@torch.no_grad()
def apply_updates(slots: Sequence[Slot], updates: Sequence[Update], views: Views) -> None:
    """Applies updates in place, with the operations and roundings of torch's own optimizers.

    The memory of the updates is free afterwards; ``views`` are kept for as long as it is used again.

    float32 and float64 weights have the bits of docs/protocol.md
    ("Arithmetic"), but where torch fuses product and sum. bfloat16 and float16 weights are rounded after the decay as
    well as after the sum.
    """
    alike: defaultdict[tuple[float, float, torch.device, torch.dtype, str], list[Update]] = defaultdict(list)
    for update in updates:
        if update.data is not None:
            tensor = slots[update.parameter.index].tensor
            alike[update.scale, update.decay, tensor.device, tensor.dtype, update.parameter.update_dtype].append(update)
    for (scale, decay, device, _, _), those in alike.items():
        tensors = [slots[update.parameter.index].tensor for update in those]
        data = [
            _data(update, tensor, views).to(device, non_blocking=True)
            for update, tensor in zip(those, tensors, strict=True)
        ]
        if decay != 0:
            _multiply(tensors, 1 - decay)
        torch._foreach_add_(tensors, data, alpha=scale)
        if device.type == "cuda" and any(not update.shared for update in those):  # pragma: no cover - needs a GPU
            # The page-locked memory is used again once this returns.
            torch.cuda.current_stream(device).synchronize()
    for update in updates:
        if update.row_scale is not None:
            _scale_rows(slots[update.parameter.index].tensor, torch.tensor(update.row_scale, device="cpu"))


def _multiply(tensors: list[torch.Tensor], factor: float) -> None:
    if tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.bfloat16, torch.float16):
        # On a CPU `_foreach_mul_` rounds the factor to the tensors' dtype: 0.998 becomes bfloat16's 0.9961, twice the
        # decay.
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def _data(update: Update, tensor: torch.Tensor, views: Views) -> torch.Tensor:
    dtype = update.parameter.update_dtype
    if isinstance(update.data, torch.Tensor):  # pragma: no cover - needs a GPU
        return update.data.view(WIRE_DTYPES[dtype]).view(tensor.shape)
    key = (id(update.data), dtype, tensor.shape)
    if key not in views:
        # The view keeps the array, and with it its id.
        views[key] = torch.from_numpy(update.data).view(WIRE_DTYPES[dtype]).view(tensor.shape)
    return views[key]


def _scale_rows(tensor: torch.Tensor, factors: torch.Tensor) -> None:
    """Rows are the first dimension, or with matrices side by side all but the last."""
    dimensions = next(n for n in range(tensor.ndim + 1) if math.prod(tensor.shape[:n]) == len(factors))
    shape = [*tensor.shape[:dimensions], *[1] * (tensor.ndim - dimensions)]
    # The factors stay float32 beside bfloat16 weights: only the product is rounded.
    tensor.mul_(factors.to(tensor.device).view(shape))
