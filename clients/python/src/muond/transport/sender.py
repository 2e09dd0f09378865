"""Messages onto the socket: one frame each, header and payload in one system call, the payload from where it lies."""

from __future__ import annotations

import os
import struct
import threading
from collections import deque

import numpy as np
import numpy.typing as npt

from .upgrade import ByteSocket

_FIN = 0x80
BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
# What the mask is: zeros leave the payload as it is, so nothing has to be touched.
_NO_MASK = bytes(4)
# A service that asks more pings than it takes answers gets the newest ones answered.
_PONGS_KEPT = 64


class Sender:
    """The sending half of a WebSocket. ``message`` may be called from one thread while another one answers pings."""

    def __init__(self, socket: ByteSocket, *, masked: bool) -> None:
        self._socket = socket
        self._masked = masked
        self._lock = threading.Lock()
        self._pongs: deque[bytes] = deque(maxlen=_PONGS_KEPT)
        self._scratch: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def message(self, head: bytes, payload: memoryview | None = None) -> None:
        """Sends one binary message of ``head`` and ``payload``. Blocks while the service does not read; raises OSError."""
        with self._lock:
            self._frame(BINARY, head, payload)
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

    def _frame(self, opcode: int, head: bytes, payload: memoryview | None = None) -> None:
        length = len(head) + (0 if payload is None else len(payload))
        key = os.urandom(4) if self._masked else _NO_MASK
        if self._masked:
            turn = len(head) & 3
            head = _mask_small(head, key)
            payload = None if payload is None else self._mask(payload, key[turn:] + key[:turn])
        self._send(_header(opcode, length, key) + head, payload)

    def _send(self, head: bytes, payload: memoryview | None) -> None:
        if payload is None:
            return self._socket.sendall(head)
        sent = self._socket.sendmsg([head, payload])
        if sent < len(head):
            self._socket.sendall(head[sent:])
            sent = len(head)
        if sent < len(head) + len(payload):
            self._socket.sendall(payload[sent - len(head) :])
        return None

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
