"""Gradients on their way out: each in memory of its own, in the dtype and order in which it travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .settings import WIRE_DTYPES
from .slots import Slot

Ready = Callable[[], None]


class Staging:
    """One buffer per parameter, used again in every step: its bytes must stay until the step's receipt, to be sent again."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        self._streams: dict[torch.device, Any] = {}

    def put(
        self, slot: Slot, gradient: torch.Tensor, *, borrow: bool, negate: bool = False
    ) -> tuple[memoryview, Ready | None]:
        """The gradient's bytes, or its negative's, and what to call before they are read.

        ``borrow``: the gradient itself does not change before.
        """
        dtype = WIRE_DTYPES[slot.declaration.gradient_dtype]
        gradient = gradient.detach().neg() if negate else gradient.detach()
        if (
            (borrow or negate)
            and gradient.device.type == "cpu"
            and gradient.dtype == dtype
            and gradient.is_contiguous()
        ):
            return memory_of(gradient), None
        buffer = self._buffer(slot, dtype, pinned=gradient.is_cuda)
        if gradient.is_cuda:  # pragma: no cover - needs a GPU
            return memory_of(buffer), self._copy_from_gpu(buffer, gradient)
        buffer.copy_(gradient)
        return memory_of(buffer), None

    def _buffer(self, slot: Slot, dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        buffer = self._buffers.get(slot.index)
        if buffer is None:
            buffer = self._buffers[slot.index] = torch.empty(slot.shape, dtype=dtype, pin_memory=pinned)
        return buffer

    def _copy_from_gpu(self, buffer: torch.Tensor, gradient: torch.Tensor) -> Ready:  # pragma: no cover - needs a GPU
        """Copies on a stream of its own, behind what computes the gradient: neither backward nor its stream waits."""
        device = gradient.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        converted = gradient.to(buffer.dtype, memory_format=torch.contiguous_format)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            buffer.copy_(converted, non_blocking=True)
            converted.record_stream(stream)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        return event.synchronize


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory; bfloat16 has no numpy dtype, bytes have."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def allocator(slots: list[Slot]) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Memory for updates: page-locked where they go to a GPU, so that the copy there does not stall."""
    pinned = any(slot.tensor.is_cuda for slot in slots)

    def allocate(size: int) -> npt.NDArray[np.uint8]:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).numpy()

    return allocate
