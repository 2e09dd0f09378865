"""Updates onto the model: W <- row_scale ⊙ ((1 - decay) · W + scale · data), a list of parameters at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from ..steps.parameter import Bound
from ..steps.updates import Update
from ..wire.dtype import BLOCKS
from .blocks import decode
from .settings import WIRE_DTYPES
from .slots import Slot


class Views:
    """The memory of updates as tensors: a run uses the same memory in every step."""

    def __init__(self) -> None:
        # By id, with what has that id: so it is nobody else's.
        self._views: dict[tuple[int, str, torch.Size], tuple[Any, torch.Tensor]] = {}
        self._copies: dict[int, torch.Tensor] = {}

    def of(self, updates: Sequence[Update], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The data of updates of like dtypes, on the device of their tensors."""
        device = tensors[0].device
        dtype = updates[0].parameter.update_dtype
        if dtype in BLOCKS:
            return [
                decode(torch.from_numpy(update.data).to(device), dtype, tensor.numel()).view(tensor.shape)
                for update, tensor in zip(updates, tensors, strict=True)
            ]
        sources = [self._view(update, tensor.shape) for update, tensor in zip(updates, tensors, strict=True)]
        if sources[0].device == device:
            return sources
        return self._copied(sources, device, shared=updates[0].shared)  # pragma: no cover - needs a GPU

    def _view(self, update: Update, shape: torch.Size) -> torch.Tensor:
        data, dtype = update.data, update.parameter.update_dtype
        known = self._views.get((id(data), dtype, shape))
        if known is None:
            whole = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
            known = data, whole.view(WIRE_DTYPES[dtype]).view(shape)
            self._views[id(data), dtype, shape] = known
        return known[1]

    def _copied(
        self, sources: Sequence[torch.Tensor], device: torch.device, *, shared: bool
    ) -> list[torch.Tensor]:  # pragma: no cover - needs a GPU
        if not shared:
            return [source.to(device, non_blocking=True) for source in sources]
        for source in sources:
            if id(source) not in self._copies:
                self._copies[id(source)] = torch.empty_like(source, device=device, pin_memory=False)
        copies = [self._copies[id(source)] for source in sources]
        torch._foreach_copy_(copies, list(sources), non_blocking=True)
        return copies


@torch.no_grad()
def apply_updates(slots: Sequence[Slot], updates: Sequence[Update], views: Views) -> None:
    """Applies updates in place, with the operations and roundings of torch's own optimizers.

    The memory of the updates is free afterwards; ``views`` are kept for as long as it is used again.

    float32 and float64 weights have the bits of docs/protocol.md
    ("Arithmetic"), but where torch fuses product and sum. bfloat16 and float16 weights are rounded after the decay as
    well as after the sum.
    """
    alike: defaultdict[tuple[float, float, torch.device, torch.dtype, str, bool], list[Update]] = defaultdict(list)
    for update in updates:
        if update.data is not None:
            tensor = slots[update.parameter.index].local
            kind = (
                update.scale,
                update.decay,
                tensor.device,
                tensor.dtype,
                update.parameter.update_dtype,
                update.shared,
            )
            alike[kind].append(update)
    for (scale, decay, device, _, _, shared), those in alike.items():
        tensors = [slots[update.parameter.index].local for update in those]
        data = views.of(those, tensors)
        if decay != 0:
            _multiply(tensors, 1 - decay)
        _add(tensors, data, scale)
        if device.type == "cuda" and not shared:  # pragma: no cover - needs a GPU
            # The page-locked memory is used again once this returns.
            torch.cuda.current_stream(device).synchronize()
    for update in updates:
        if update.row_scale is not None:
            factors = torch.tensor(update.row_scale, device="cpu")
            _scale_rows(slots[update.parameter.index].local, factors, update.parameter)


# Adding more than these takes a GPU longer than launching a kernel for it.
_SMALL_ELEMENTS = 1 << 18


def _add(tensors: list[torch.Tensor], data: list[torch.Tensor], scale: float) -> None:
    if tensors[0].device.type == "cuda" and tensors[0].dtype != data[0].dtype:  # pragma: no cover - needs a GPU
        # For two dtypes `_foreach_add_` launches a kernel for each tensor: many small ones are of one dtype sooner.
        small = [i for i, tensor in enumerate(tensors) if tensor.numel() <= _SMALL_ELEMENTS]
        large = [i for i, tensor in enumerate(tensors) if tensor.numel() > _SMALL_ELEMENTS]
        widened = [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in small]
        if small:
            torch._foreach_copy_(widened, [data[i] for i in small])
            torch._foreach_add_([tensors[i] for i in small], widened, alpha=scale)
        tensors, data = [tensors[i] for i in large], [data[i] for i in large]
    if tensors:  # pragma: no branch - on a CPU there are some
        torch._foreach_add_(tensors, data, alpha=scale)


def _multiply(tensors: list[torch.Tensor], factor: float) -> None:
    if tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.bfloat16, torch.float16):
        # On a CPU `_foreach_mul_` rounds the factor to the tensors' dtype: 0.998 becomes bfloat16's 0.9961, twice the
        # decay.
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def _scale_rows(tensor: torch.Tensor, factors: torch.Tensor, parameter: Bound) -> None:
    """Rows are the first dimension, or with matrices side by side all but the last; of a shard each element has its own."""
    if parameter.ranges is not None:
        elements = torch.from_numpy(parameter.ranges.elements(slice(0, parameter.size)))
        factors = factors[elements // (parameter.whole // len(factors))]
        tensor.mul_(factors.to(tensor.device).view(tensor.shape))
        return
    dimensions = next(n for n in range(tensor.ndim + 1) if math.prod(tensor.shape[:n]) == len(factors))
    shape = [*tensor.shape[:dimensions], *[1] * (tensor.ndim - dimensions)]
    # The factors stay float32 beside bfloat16 weights: only the product is rounded.
    tensor.mul_(factors.to(tensor.device).view(shape))
