"""Memory that this process shares with a service on its own host: gradients and updates that cross no socket.

docs/protocol.md, "Shared memory": an arena for gradients and one for updates, each with a slot for every parameter.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..wire.frame import Frame

Sizes = Sequence[int]
"""Bytes of each parameter's tensor, in the order of ``open``."""

PROOF_BYTES = 32
HEAD_BYTES = 256
"""Bytes before the first slot: the proof lies in them."""
_ALIGNMENT = 256


class GradientSlots(Protocol):
    """Shared memory with a slot for the gradient of each parameter."""

    @property
    def kind(self) -> str:
        """The transport: ``shm`` or ``cuda-ipc``."""

    def gradient(self, index: int) -> Any:
        """The bytes of a gradient's slot, without a copy, to be written."""

    def gradient_bytes(self, index: int) -> memoryview:
        """The bytes of a gradient's slot, for a connection that takes them over its socket after all."""


class Arenas(GradientSlots, Protocol):
    """Both arenas of a client. Their bytes stay what they are over any number of connections."""

    def offer(self) -> Frame:
        """What ``open`` says of them. A new nonce is written for each connection."""

    def proved(self) -> bool:
        """Whether the service has answered the last nonce in memory: it sees the same bytes."""

    def update(self, index: int) -> Any:
        """The bytes of an update's slot, without a copy."""

    def close(self) -> None:
        """Lets the memory go. No connection uses it any more."""


def lay_out(sizes: Sizes) -> tuple[list[int], int]:
    """Where each slot begins, and the bytes of the whole arena."""
    offsets: list[int] = []
    end = HEAD_BYTES
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class Slots:
    """The slots of one arena. Each is one object for ever: who keeps views of it knows it again."""

    def __init__(self, whole: Any, sizes: Sizes) -> None:
        """``whole``: the arena's bytes, in anything that slices without a copy."""
        self.whole = whole
        self._sizes = list(sizes)
        self._offsets, _ = lay_out(sizes)
        self._known: dict[int, Any] = {}

    @property
    def count(self) -> int:  # pragma: no cover - needs a GPU
        return len(self._sizes)

    def slot(self, index: int) -> Any:
        if index not in self._known:
            offset = self._offsets[index]
            self._known[index] = self.whole[offset : offset + self._sizes[index]]
        return self._known[index]


def answer_to(nonce: bytes) -> bytes:
    """What a service writes that has seen the nonce."""
    return hashlib.sha256(nonce).digest()


class HostArenas:
    """Two memfds, sealed against shrinking, that the service maps. Pages that nobody touches take no memory."""

    kind = "shm"

    def __init__(self, gradients: Sizes, updates: Sizes) -> None:
        """Raises OSError or AttributeError on systems without memfd."""
        self._nonce = b""
        self._descriptors: list[int] = []
        self._gradients, self._updates = (Slots(self._map(lay_out(s)[1]), s) for s in (gradients, updates))

    def offer(self) -> Frame:
        self._nonce = secrets.token_bytes(PROOF_BYTES)
        gradients, updates = self.whole()
        gradients[:PROOF_BYTES] = np.frombuffer(self._nonce, np.uint8)
        updates[:PROOF_BYTES] = 0
        return {"kind": self.kind, "nonce": self._nonce, "process": os.getpid(), "descriptors": list(self._descriptors)}

    def proved(self) -> bool:
        return bytes(self._updates.whole[:PROOF_BYTES].tobytes()) == answer_to(self._nonce)

    def gradient(self, index: int) -> npt.NDArray[np.uint8]:
        """The slot of a gradient, to be written."""
        slot: npt.NDArray[np.uint8] = self._gradients.slot(index)
        return slot

    def gradient_bytes(self, index: int) -> memoryview:
        return self.gradient(index).data

    def update(self, index: int) -> npt.NDArray[np.uint8]:
        slot: npt.NDArray[np.uint8] = self._updates.slot(index)
        return slot

    def close(self) -> None:
        # The mapping itself lives as long as somebody has a view of it.
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def whole(self) -> list[npt.NDArray[np.uint8]]:
        """All bytes of both arenas."""
        return [self._gradients.whole, self._updates.whole]

    def _map(self, size: int) -> npt.NDArray[np.uint8]:
        descriptor = os.memfd_create("muond", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._descriptors.append(descriptor)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
