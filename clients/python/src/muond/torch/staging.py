"""Gradients on their way out: each in memory of its own, in the dtype and order in which it travels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..run import Run
from ..steps.step import Gradient
from ..transport.arenas import GradientSlots, HostArenas
from ..whole.shares import ShardArenas
from ..wire.dtype import BLOCKS
from .blocks import encode
from .feedback import Feedback
from .gpu_arenas import GpuArenas
from .hyperparameters import COUPLED, plain
from .settings import WIRE_DTYPES
from .slots import Slot

Ready = Callable[[], None]


Row = tuple[Slot, torch.Tensor, Mapping[str, Any]]
"""A parameter, its gradient, and its group."""


class Staging:
    """One buffer per parameter, used again in every step: its bytes must stay until the step's receipt, to be sent again.

    Where the run shares memory, the buffers are the slots of that.
    """

    def __init__(self, feedback: Feedback | None = None) -> None:
        self._feedback = feedback
        self._buffers: dict[int, tuple[torch.Tensor, memoryview]] = {}
        self._slots: dict[int, tuple[GradientSlots, torch.Tensor]] = {}
        """The slots of shared memory as tensors, with the memory that has them."""
        self._rounded: dict[int, torch.Tensor] = {}
        """Gradients of a GPU in the dtype in which they travel, on their way to host memory."""
        self._streams: dict[torch.device, Any] = {}
        self._placed: list[tuple[GradientSlots, list[int]]] = []
        """The parameters whose gradients lie in their slots already, and are complete there."""

    def send(self, run: Run, rows: Sequence[Row], *, borrow: bool) -> None:
        """Adds gradients to the step in flight. ``borrow``: they do not change before its receipt."""
        placed, self._placed = self._placed, []
        if placed:  # pragma: no cover - needs a GPU
            for arenas, indices in placed:
                run.gradient_placed(indices, arenas)
            return
        for memory, those in _by_arenas(run, rows):
            if memory is None:
                put = [(slot.index, *self.put(slot, gradient, group, borrow=borrow)) for slot, gradient, group in those]
                run.gradients_bytes([Gradient(*each) for each in put])
            else:
                self._send_placed(run, memory, those)

    def _send_placed(self, run: Run, arenas: GradientSlots, rows: Sequence[Row]) -> None:
        for device in {gradient.device: None for _, gradient, _ in rows}:
            those = [row for row in rows if row[1].device == device]
            ready = self._place(arenas, those)
            run.gradient_placed([slot.index for slot, _, _ in those], arenas, ready)

    def place_finite(self, run: Run, rows: Sequence[Row]) -> bool:  # pragma: no cover - needs a GPU
        """Copies gradients to slots on their GPU before they are sent, and says whether all of them are finite as they travel."""
        placed: list[tuple[GradientSlots, list[int]]] = []
        finite = True
        for arenas, those in _by_arenas(run, rows):
            assert arenas is not None, "a run over memory of the GPU has a slot for every parameter"
            ready = self._place(arenas, those)
            assert ready is not None, "a copy on a GPU is waited for"
            finite = self._finite(arenas, those) and finite
            placed.append((arenas, [slot.index for slot, _, _ in those]))
        self._placed = placed if finite else []
        return finite

    def _finite(self, arenas: GradientSlots, rows: Sequence[Row]) -> bool:  # pragma: no cover - needs a GPU
        """One answer for all slots, and one wait for the GPU."""
        slots = [self._slot(arenas, slot) for slot, _, _ in rows]
        dtypes = {slot.dtype: None for slot in slots}
        if isinstance(arenas, GpuArenas) and len(dtypes) == 1 and len(rows) == arenas.count:
            # What lies between the slots is zero, so all of them are one tensor.
            return bool(torch.linalg.vector_norm(arenas.gradients.view(slots[0].dtype), float("inf")).isfinite())
        of_each_dtype: list[torch.Tensor] = []
        for dtype in dtypes:
            alike = [slot for slot in slots if slot.dtype == dtype]
            of_each_dtype.append(torch.stack(torch._foreach_norm(alike, float("inf"))).isfinite().all())
        return bool(torch.stack(of_each_dtype).all())

    def _place(self, arenas: GradientSlots, rows: Sequence[Row]) -> Ready | None:
        """Copies gradients to their slots; what to call before anybody else reads those."""
        gradients = [_as_taken(gradient, slot.local.detach(), group) for slot, gradient, group in rows]
        slots = [self._slot(arenas, slot) for slot, _, _ in rows]
        if gradients[0].is_cuda:  # pragma: no cover - needs a GPU
            return self._place_from_gpu(arenas, rows, slots, gradients)
        torch._foreach_copy_(slots, gradients)
        return None

    def _place_from_gpu(
        self, arenas: GradientSlots, rows: Sequence[Row], slots: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> Ready:  # pragma: no cover - needs a GPU
        device = gradients[0].device
        if slots[0].is_cuda:
            torch._foreach_copy_(slots, gradients)
            return _event(torch.cuda.current_stream(device))
        own = arenas.own if isinstance(arenas, ShardArenas) else arenas
        if isinstance(own, HostArenas):
            lock_pages(own)
        for row, gradient in zip(rows, gradients, strict=True):
            if row[0].index not in self._rounded:
                dtype = WIRE_DTYPES[row[0].declaration.gradient_dtype]
                self._rounded[row[0].index] = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
        rounded = [self._rounded[slot.index] for slot, _, _ in rows]
        torch._foreach_copy_(rounded, gradients)
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch._foreach_copy_(slots, rounded, non_blocking=True)
        return _event(stream)

    def _slot(self, arenas: GradientSlots, slot: Slot) -> torch.Tensor:
        known = self._slots.get(slot.index)
        if known is not None and known[0] is arenas:
            return known[1]
        given = arenas.gradient(slot.index)
        whole = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
        place = whole.view(WIRE_DTYPES[slot.declaration.gradient_dtype]).view(slot.local.shape)
        self._slots[slot.index] = arenas, place
        return place

    def put(
        self, slot: Slot, gradient: torch.Tensor, group: Mapping[str, Any], *, borrow: bool
    ) -> tuple[memoryview, Ready | None]:
        """The bytes of the gradient as the service takes it, and what to call before they are read.

        ``borrow``: the gradient itself does not change before.
        """
        dtype = WIRE_DTYPES[slot.declaration.gradient_dtype]
        given = gradient.detach()
        gradient = _as_taken(given, slot.local.detach(), group)
        if slot.declaration.gradient_dtype in BLOCKS:
            return memory_of(self._encoded(slot, gradient)), None
        # What was computed here is nobody else's to change.
        borrow = borrow or gradient is not given
        if borrow and gradient.device.type == "cpu" and gradient.dtype == dtype and gradient.is_contiguous():
            return memory_of(gradient), None
        buffer, memory = self._buffer(slot, dtype, pinned=gradient.is_cuda)
        if gradient.is_cuda:  # pragma: no cover - needs a GPU
            return memory, self._copy_from_gpu(buffer, gradient)
        buffer.copy_(gradient)
        return memory, None

    def _encoded(self, slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
        if self._feedback is None:
            return encode(gradient.float(), slot.declaration.gradient_dtype).cpu()
        return self._feedback.encode(slot, gradient).cpu()

    def _buffer(self, slot: Slot, dtype: torch.dtype, *, pinned: bool) -> tuple[torch.Tensor, memoryview]:
        if slot.index not in self._buffers:
            buffer = torch.empty(slot.local.shape, dtype=dtype, device="cpu", pin_memory=pinned)
            self._buffers[slot.index] = buffer, memory_of(buffer)
        return self._buffers[slot.index]

    def _copy_from_gpu(self, buffer: torch.Tensor, gradient: torch.Tensor) -> Ready:  # pragma: no cover - needs a GPU
        """Copies on a stream of its own, behind what computes the gradient: neither backward nor its stream waits."""
        device = gradient.device
        stream = self._stream(device)
        converted = gradient.to(buffer.dtype, memory_format=torch.contiguous_format)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            buffer.copy_(converted, non_blocking=True)
            converted.record_stream(stream)
        return _event(stream)

    def _stream(self, device: torch.device) -> Any:  # pragma: no cover - needs a GPU
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


def _by_arenas(run: Run, rows: Sequence[Row]) -> list[tuple[GradientSlots | None, list[Row]]]:
    """The gradients by the memory that has slots for them."""
    found: dict[int, tuple[GradientSlots | None, list[Row]]] = {}
    for row in rows:
        arenas = run.arenas_of(row[0].index)
        found.setdefault(id(arenas), (arenas, []))[1].append(row)
    return list(found.values())


def _event(stream: Any) -> Ready:  # pragma: no cover - needs a GPU
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event.synchronize


def lock_pages(arenas: HostArenas) -> None:  # pragma: no cover - needs a GPU
    """Page-locks shared memory, once, so that copies between it and the GPU run at full speed."""
    if arenas in _locked:
        return
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    addresses = [whole.ctypes.data for whole in arenas.whole()]
    for whole, address in zip(arenas.whole(), addresses, strict=True):
        torch.cuda.check_error(int(cudart.cudaHostRegister(address, whole.nbytes, 0)))
    # It ends with the arenas, before their memory does.
    _locked[arenas] = weakref.finalize(arenas, lambda: [cudart.cudaHostUnregister(address) for address in addresses])


_locked: weakref.WeakKeyDictionary[HostArenas, Any] = weakref.WeakKeyDictionary()


def _as_taken(gradient: torch.Tensor, weights: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """What torch does before anything else: G <- -G where it maximizes, then G + decay · W where the decay is the gradient's."""
    if group.get("maximize"):
        gradient = gradient.neg()
    decay = plain(group["weight_decay"]) if group["algorithm"] in COUPLED else 0
    return gradient.add(weights, alpha=decay) if decay else gradient


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory; bfloat16 has no numpy dtype, bytes have."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def allocator(slots: list[Slot]) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Memory for updates: page-locked where they go to a GPU, so that the copy there does not stall."""
    pinned = any(slot.tensor.is_cuda for slot in slots)

    def allocate(size: int) -> npt.NDArray[np.uint8]:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned).numpy()

    return allocate
