"""Gradients with NaN or Inf, before anything is sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from .settings import WIRE_DTYPES
from .slots import Slot


def nonfinite(slots: Sequence[Slot]) -> list[Slot]:
    """The slots whose gradient has a NaN or an infinity, as it is or as it travels; one answer for each device."""
    alike: defaultdict[tuple[torch.device, torch.dtype, str], list[tuple[Slot, torch.Tensor]]] = defaultdict(list)
    for slot in slots:
        gradient = slot.gradient
        if gradient is not None and gradient.numel() > 0:
            alike[gradient.device, gradient.dtype, slot.declaration.gradient_dtype].append((slot, gradient))
    found: list[Slot] = []
    for (device, given, dtype), pairs in alike.items():
        if device.type == "cpu" and given == WIRE_DTYPES[dtype]:
            pairs = _suspicious(pairs)
        if not pairs:
            continue
        largest = torch._foreach_norm([gradient for _, gradient in pairs], float("inf"))
        # What is finite in float32 may not be so in the dtype it travels in.
        finite = torch.stack(largest).to(WIRE_DTYPES[dtype]).isfinite().tolist()
        found += [slot for (slot, _), fine in zip(pairs, finite, strict=True) if not fine]
    return found


def _suspicious(pairs: list[tuple[Slot, torch.Tensor]]) -> list[tuple[Slot, torch.Tensor]]:
    """Those whose sum is not finite: a NaN or an infinity makes it so, and large numbers may.

    A CPU sums up ten times as fast as it looks for the largest.
    """
    sums = torch.stack([gradient.sum(dtype=_sum_dtype(gradient)) for _, gradient in pairs])
    return [pair for pair, fine in zip(pairs, sums.isfinite().tolist(), strict=True) if not fine]


def _sum_dtype(gradient: torch.Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)
