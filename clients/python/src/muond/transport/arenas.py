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
_HEAD_BYTES = 256
_ALIGNMENT = 256


class Arenas(Protocol):
    """Both arenas of a client. Their bytes stay what they are over any number of connections."""

    @property
    def kind(self) -> str:
        """The transport: ``shm`` or ``cuda-ipc``."""

    def offer(self) -> Frame:
        """What ``open`` says of them. A new nonce is written for each connection."""

    def proved(self) -> bool:
        """Whether the service has answered the last nonce in memory: it sees the same bytes."""

    def gradient(self, index: int) -> Any:
        """The bytes of a gradient's slot, without a copy, to be written."""

    def gradient_bytes(self, index: int) -> memoryview:
        """The bytes of a gradient's slot, for a connection that takes them over its socket after all."""

    def update(self, index: int) -> Any:
        """The bytes of an update's slot, without a copy."""

    def close(self) -> None:
        """Lets the memory go. No connection uses it any more."""


def lay_out(sizes: Sizes) -> tuple[list[int], int]:
    """Where each slot begins, and the bytes of the whole arena."""
    offsets: list[int] = []
    end = _HEAD_BYTES
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def answer_to(nonce: bytes) -> bytes:
    """What a service writes that has seen the nonce."""
    return hashlib.sha256(nonce).digest()


class HostArenas:
    """Two memfds, sealed against shrinking, that the service maps. Pages that nobody touches take no memory."""

    kind = "shm"

    def __init__(self, gradients: Sizes, updates: Sizes) -> None:
        """Raises OSError or AttributeError on systems without memfd."""
        self._sizes = (list(gradients), list(updates))
        self._nonce = b""
        self._descriptors: list[int] = []
        self._bytes: list[npt.NDArray[np.uint8]] = []
        self._offsets: list[list[int]] = []
        # Each slot is one array for ever: who keeps views of it knows it again.
        self._slots: tuple[dict[int, npt.NDArray[np.uint8]], dict[int, npt.NDArray[np.uint8]]] = ({}, {})
        for sizes in self._sizes:
            offsets, size = lay_out(sizes)
            self._offsets.append(offsets)
            self._add(size)

    def offer(self) -> Frame:
        self._nonce = secrets.token_bytes(PROOF_BYTES)
        gradients, updates = self._bytes
        gradients[:PROOF_BYTES] = np.frombuffer(self._nonce, np.uint8)
        updates[:PROOF_BYTES] = 0
        return {"kind": self.kind, "nonce": self._nonce, "process": os.getpid(), "descriptors": list(self._descriptors)}

    def proved(self) -> bool:
        return self._bytes[1][:PROOF_BYTES].tobytes() == answer_to(self._nonce)

    def gradient(self, index: int) -> npt.NDArray[np.uint8]:
        """The slot of a gradient, to be written."""
        return self._slot(0, index)

    def gradient_bytes(self, index: int) -> memoryview:
        return self.gradient(index).data

    def update(self, index: int) -> npt.NDArray[np.uint8]:
        return self._slot(1, index)

    def close(self) -> None:
        # The mapping itself lives as long as somebody has a view of it.
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def whole(self) -> list[npt.NDArray[np.uint8]]:  # pragma: no cover - a GPU locks its pages
        """All bytes of both arenas."""
        return self._bytes

    def _slot(self, arena: int, index: int) -> npt.NDArray[np.uint8]:
        known = self._slots[arena].get(index)
        if known is None:
            offset = self._offsets[arena][index]
            known = self._slots[arena][index] = self._bytes[arena][offset : offset + self._sizes[arena][index]]
        return known

    def _add(self, size: int) -> None:
        descriptor = os.memfd_create("muond", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._descriptors.append(descriptor)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._bytes.append(np.frombuffer(mmap.mmap(descriptor, size), np.uint8))
