"""Gradients with NaN or Inf, before anything is sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from .settings import WIRE_DTYPES
from .slots import Slot

_Pair = tuple[Slot, torch.Tensor]


def nonfinite(slots: Sequence[Slot]) -> list[Slot]:
    """The slots whose gradient has a NaN or an infinity, as it is or as it travels; one answer for each device."""
    alike: defaultdict[tuple[torch.device, torch.dtype, torch.dtype], list[_Pair]] = defaultdict(list)
    for slot in slots:
        gradient = slot.gradient
        if gradient is not None and gradient.numel() > 0:
            wire = WIRE_DTYPES[slot.declaration.gradient_dtype]
            alike[gradient.device, gradient.dtype, wire].append((slot, gradient))
    found: list[Slot] = []
    for (device, _, wire), pairs in alike.items():
        # A root of squares is no less than the largest element, and a CPU has it twenty times as fast.
        suspicious = _beyond(pairs, wire, 2.0) if device.type == "cpu" else pairs
        found += [slot for slot, _ in _beyond(suspicious, wire, float("inf"))]
    return found


def _beyond(pairs: list[_Pair], wire: torch.dtype, order: float) -> list[_Pair]:
    """Those whose norm is not finite in the dtype in which they travel: what is finite in float32 may not be so in that."""
    if not pairs:
        return []
    norms = torch._foreach_norm([gradient for _, gradient in pairs], order)
    finite = torch.stack(norms).to(wire).isfinite().tolist()
    return [pair for pair, fine in zip(pairs, finite, strict=True) if not fine]
