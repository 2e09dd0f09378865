"""Memory of a GPU that is shared with a service on the same GPU: gradients and updates never leave it."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..transport.arenas import HEAD_BYTES, PROOF_BYTES, Sizes, Slots, answer_to, lay_out
from ..transport.choice import MakeArenas
from ..wire.frame import Frame
from .slots import Slot

_HANDLE_BYTES = 64


def arenas_of(slots: list[Slot]) -> MakeArenas | None:
    """Makes arenas on the GPU that has all parameters; None where there is no such GPU."""
    devices = {slot.tensor.device for slot in slots}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return None
    return partial(GpuArenas, next(iter(devices)))  # pragma: no cover - needs a GPU


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * _HANDLE_BYTES),)


class GpuArenas:  # pragma: no cover - needs a GPU: bench/python/samehost.py
    """Two allocations of their own, exported by handle. Those of torch's allocator cannot be: it moves and splits its memory."""

    kind = "cuda-ipc"

    def __init__(self, device: torch.device, gradients: Sizes, updates: Sizes) -> None:
        """Raises OSError where the driver refuses."""
        self._device = device
        self._nonce = b""
        self._pointers: list[int] = []
        self._arenas: list[Slots] = []
        try:
            for sizes in (gradients, updates):
                _, size = lay_out(sizes)
                self._pointers.append(self._allocate(size))
                whole = torch.as_tensor(_Bytes(self._pointers[-1], size), device=device)
                whole.zero_()
                self._arenas.append(Slots(whole, sizes))
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """The number of slots."""
        return self._arenas[0].count

    @property
    def gradients(self) -> torch.Tensor:
        """The bytes of all gradients' slots, and zeros between them."""
        gradients: torch.Tensor = self._arenas[0].whole[HEAD_BYTES:]
        return gradients

    def offer(self) -> Frame:
        self._nonce = secrets.token_bytes(PROOF_BYTES)
        gradients, updates = (arena.whole for arena in self._arenas)
        gradients[:PROOF_BYTES].copy_(torch.frombuffer(bytearray(self._nonce), dtype=torch.uint8))
        updates[:PROOF_BYTES].zero_()
        torch.cuda.synchronize(self._device)
        uuid = torch.cuda.get_device_properties(self._device).uuid
        return {
            "kind": self.kind,
            "nonce": self._nonce,
            "gpu": f"GPU-{uuid}",
            "handles": [self._handle(pointer) for pointer in self._pointers],
        }

    def proved(self) -> bool:
        return bytes(self._arenas[1].whole[:PROOF_BYTES].cpu().numpy()) == answer_to(self._nonce)

    def gradient(self, index: int) -> torch.Tensor:
        """The slot of a gradient, to be written."""
        slot: torch.Tensor = self._arenas[0].slot(index)
        return slot

    def gradient_bytes(self, index: int) -> memoryview:
        copy: npt.NDArray[np.uint8] = self.gradient(index).cpu().numpy()
        return copy.data

    def update(self, index: int) -> torch.Tensor:
        slot: torch.Tensor = self._arenas[1].slot(index)
        return slot

    def close(self) -> None:
        self._arenas.clear()
        # What is queued still reads the updates.
        torch.cuda.synchronize(self._device)
        while self._pointers:
            self._call("cuMemFree_v2", ctypes.c_uint64(self._pointers.pop()))

    def _allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def _handle(self, pointer: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return bytes(handle.bytes)

    def _call(self, name: str, *arguments: Any) -> None:
        # The driver's context is the thread's, and torch sets it with the device.
        with torch.cuda.device(self._device):
            torch.cuda.current_stream(self._device)
            function: Callable[..., int] = getattr(ctypes.CDLL("libcuda.so.1"), name)
            error = function(*arguments)
        if error != 0:
            raise OSError(f"{name} failed with error {error} of the CUDA driver")


class _Bytes:  # pragma: no cover - needs a GPU
    """Bytes at an address of a GPU, as torch.as_tensor takes them without a copy."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }
