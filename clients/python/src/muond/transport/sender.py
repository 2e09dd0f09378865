"""Messages onto the socket: one frame each, many of them in one system call, their payloads from where they lie."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .upgrade import ByteSocket

_FIN = 0x80
BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
# What the mask is: zeros leave the payload as it is, so nothing has to be touched.
_NO_MASK = bytes(4)
# A service that asks more pings than it takes answers gets the newest ones answered.
_PONGS_KEPT = 64
# Linux and macOS take so many parts in one system call (IOV_MAX); two for each message.
_PARTS = 1024


Message = tuple[bytes, memoryview]
"""The first bytes of a message, and the rest of it, which is sent from where it lies."""


class Sender:
    """The sending half of a WebSocket. ``messages`` may be called from one thread while another one answers pings."""

    def __init__(self, socket: ByteSocket, *, masked: bool) -> None:
        self._socket = socket
        self._masked = masked
        self._lock = threading.Lock()
        self._pongs: deque[bytes] = deque(maxlen=_PONGS_KEPT)
        self._scratch: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def message(self, head: bytes) -> None:
        """Sends one binary message. Blocks while the service does not read; raises OSError."""
        self.messages([(head, memoryview(b""))])

    def messages(self, messages: Sequence[Message]) -> None:
        """Sends binary messages of a head and a payload each, unmasked ones in few system calls. Blocks and raises as ``message``."""
        with self._lock:
            if self._masked:
                for head, payload in messages:
                    self._masked_frame(head, payload)
            else:
                self._gather(messages)
            while self._pongs:
                self._frame(PONG, self._pongs.popleft())

    def pong(self, data: bytes) -> None:
        """Answers a ping: at once, or behind the message that is being sent. The receiving thread never waits here."""
        self._pongs.append(data)
        if self._lock.acquire(blocking=False):
            try:
                while self._pongs:
                    self._frame(PONG, self._pongs.popleft())
            finally:
                self._lock.release()

    def close(self, code: int, wait_seconds: float) -> bool:
        """Sends a close frame unless a message is in the way for that long; whether it was sent."""
        if not self._lock.acquire(timeout=wait_seconds):
            return False
        try:
            self._frame(CLOSE, struct.pack(">H", code))
        except OSError:  # the other side was first
            return False
        finally:
            self._lock.release()
        return True

    def _frame(self, opcode: int, data: bytes) -> None:
        key = os.urandom(4) if self._masked else _NO_MASK
        self._socket.sendall(_header(opcode, len(data), key) + _mask_small(data, key))

    def _masked_frame(self, head: bytes, payload: memoryview) -> None:
        key = os.urandom(4)
        turn = len(head) & 3
        header = _header(BINARY, len(head) + len(payload), key) + _mask_small(head, key)
        self._send([header, self._mask(payload, key[turn:] + key[:turn])])

    def _gather(self, messages: Sequence[Message]) -> None:
        parts: list[bytes | memoryview] = []
        for head, payload in messages:
            parts.append(_header(BINARY, len(head) + len(payload), _NO_MASK) + head)
            if len(payload) > 0:
                parts.append(payload)
        for first in range(0, len(parts), _PARTS):
            self._send(parts[first : first + _PARTS])

    def _send(self, parts: list[bytes | memoryview]) -> None:
        sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._socket.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    def _mask(self, data: memoryview, key: bytes) -> memoryview:
        """The masked bytes, in memory that the next call uses again."""
        size = len(data)
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8)
        source, out, words = np.frombuffer(data, np.uint8), self._scratch[:size], size // 8 * 8
        pattern = np.frombuffer(key * 2, np.uint64)[0]
        np.bitwise_xor(source[:words].view(np.uint64), pattern, out=out[:words].view(np.uint64))
        out[words:] = np.bitwise_xor(source[words:], np.frombuffer(key * 2, np.uint8)[: size - words])
        return out.data


def _mask_small(data: bytes, key: bytes) -> bytes:
    repeated = key * (len(data) // 4 + 1)
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated[: len(data)], "big")).to_bytes(len(data), "big")


def _header(opcode: int, length: int, key: bytes) -> bytes:
    first = _FIN | opcode
    if length < 126:
        return struct.pack(">BB", first, 0x80 | length) + key
    if length < 1 << 16:
        return struct.pack(">BBH", first, 0x80 | 126, length) + key
    return struct.pack(">BBQ", first, 0x80 | 127, length) + key
