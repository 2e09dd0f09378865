"""Messages from the socket: the payload of a large update goes from the kernel straight into the memory it is meant for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..error import MuondError, malformed
from ..wire.frame import Frame, check_frame, decode_frame
from ..wire.msgpack import Incomplete, Malformed, decode_head
from .sender import BINARY, CLOSE, PING, PONG
from .upgrade import ByteSocket

CONTINUATION, TEXT = 0x0, 0x1
# Frame headers are read together with what follows them; what is larger than half of it is read past this memory.
_SCRATCH_BYTES = 1 << 16
_DIRECT_BYTES = _SCRATCH_BYTES // 2
# `opened` lists every parameter, and an update may have 4 MiB of row scales beside its data.
MESSAGE_BYTES = 64 << 20
# The service sends the keys before the data as one fragment. A message in many small ones is collected whole instead.
_FRAGMENTS_LOOKED_AT = 4


@dataclass(frozen=True)
class Closed:
    """The end of a connection: the close frame's code and reason, or 1006 where the socket just ended."""

    code: int
    reason: str


@dataclass(frozen=True)
class Received:
    """One frame. ``placed``: its ``data`` is not in it but in the memory that ``destination`` named."""

    frame: Frame
    placed: bool


class Receiver:
    """The receiving half of a WebSocket, for one thread.

    ``destination(frame, length)`` gives the memory for the ``data`` of a frame whose other keys have arrived, or None: the
    data is then a copy in the frame. ``ping(data)`` is called for every ping.
    """

    def __init__(
        self,
        socket: ByteSocket,
        rest: bytes,
        *,
        destination: Callable[[Frame, int], memoryview | None],
        ping: Callable[[bytes], None],
    ) -> None:
        self._socket = socket
        self._scratch = bytearray(max(_SCRATCH_BYTES, len(rest)))
        self._scratch[: len(rest)] = rest
        self._view = memoryview(self._scratch)
        self._start, self._end = 0, len(rest)
        self._destination = destination
        self._ping = ping

    def next(self) -> Received | Closed:
        """The next frame. Raises MuondError for what is no frame of the protocol, OSError if the socket fails."""
        try:
            return self._message()
        except EOFError:
            return Closed(1006, "")

    def _message(self) -> Received | Closed:
        message = _Message(self)
        while True:
            fin, opcode, length = self._frame_header()
            if opcode == CLOSE:
                return _closed(self._bytes(length))
            if opcode in (PING, PONG):
                data = self._bytes(length)
                if opcode == PING:
                    self._ping(data)
                continue
            if message.take(opcode, length, fin=fin):
                return message.finish()

    def _frame_header(self) -> tuple[bool, int, int]:
        first, second = self._bytes(2)
        fin, opcode, length = bool(first & 0x80), first & 0x0F, second & 0x7F
        if first & 0x70 or second & 0x80:
            raise malformed("the service sent a masked frame, or one with reserved bits")
        if opcode >= CLOSE and (not fin or length > 125 or opcode > PONG):
            raise malformed(f"the service sent a control frame {opcode:#x} in pieces, too long or of an unknown kind")
        if length == 126:
            length = struct.unpack(">H", self._bytes(2))[0]
        elif length == 127:
            length = struct.unpack(">Q", self._bytes(8))[0]
        if length > MESSAGE_BYTES:
            raise MuondError("FRAME_TOO_LARGE", f"the service sent a frame of {length} bytes, at most {MESSAGE_BYTES}")
        return fin, opcode, length

    def _bytes(self, count: int) -> bytes:
        out = bytearray(count)
        self.read_into(memoryview(out))
        return bytes(out)

    def destination(self, frame: Frame, length: int) -> memoryview | None:
        return self._destination(frame, length)

    def read_into(self, view: memoryview) -> None:
        """Fills ``view``; raises EOFError if the socket ends before."""
        while len(view) > 0:
            if self._start < self._end:
                count = min(self._end - self._start, len(view))
                view[:count] = self._view[self._start : self._start + count]
                self._start += count
            elif len(view) >= _DIRECT_BYTES:
                count = self._receive(view)
            else:
                self._start, self._end = 0, self._receive(self._view)
                continue
            view = view[count:]

    def _receive(self, view: memoryview) -> int:
        count = self._socket.recv_into(view)
        if count == 0:
            raise EOFError
        return count


class _Message:
    """One message as its fragments come: either collected, or its data placed."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._collected = bytearray()
        self._begun = False
        self._looks_left = _FRAGMENTS_LOOKED_AT
        self._frame: Frame | None = None
        self._room = memoryview(b"")

    def take(self, opcode: int, length: int, *, fin: bool) -> bool:
        """Takes one fragment; whether it was the last."""
        if opcode == TEXT:
            raise malformed("the service sent a text message")
        if opcode != (CONTINUATION if self._begun else BINARY):
            raise malformed(f"the service sent a frame {opcode:#x} {'inside' if self._begun else 'outside'} a message")
        self._begun = True
        if self._frame is None and length > _SCRATCH_BYTES:
            # The keys before the data are in the first bytes of a message that comes in one piece.
            self._collect(_SCRATCH_BYTES)
            length -= _SCRATCH_BYTES
            self._place()
        if self._frame is not None:
            self._fill(length)
        else:
            self._collect(length)
            if not fin:
                self._place()
        return fin

    def finish(self) -> Received:
        if self._frame is None:
            return Received(decode_frame(self._collected), placed=False)
        if len(self._room) > 0:
            raise malformed(
                f"the service sent {self._frame['type']} with {len(self._room)} bytes of data less than declared"
            )
        return Received(self._frame, placed=True)

    def _collect(self, length: int) -> None:
        have = len(self._collected)
        if have + length > MESSAGE_BYTES:
            raise MuondError("FRAME_TOO_LARGE", f"the service sent a message of more than {MESSAGE_BYTES} bytes")
        self._collected.extend(bytes(length))
        self._receiver.read_into(memoryview(self._collected)[have:])

    def _place(self) -> None:
        """Looks for memory for the data, once the keys before it are there."""
        if self._looks_left == 0:
            return
        self._looks_left -= 1
        try:
            found = decode_head(self._collected)
        except Incomplete:
            return
        except Malformed as error:
            raise malformed(f"the service sent what is no frame: {error}") from error
        if found is None:
            return
        frame, start, length = found
        room = self._receiver.destination(check_frame(frame), length)
        if room is None:
            return
        self._frame, self._room = frame, room
        self._give(memoryview(self._collected)[start:])

    def _give(self, data: memoryview) -> None:
        self._check(len(data))
        self._room[: len(data)] = data
        self._room = self._room[len(data) :]

    def _fill(self, length: int) -> None:
        self._check(length)
        self._receiver.read_into(self._room[:length])
        self._room = self._room[length:]

    def _check(self, length: int) -> None:
        if length > len(self._room):
            raise malformed(
                f"the service sent {length} bytes of data where {len(self._room)} were left of what it declared"
            )


def _closed(payload: bytes) -> Closed:
    if len(payload) < 2:
        return Closed(1005, "")
    return Closed(struct.unpack(">H", payload[:2])[0], payload[2:].decode(errors="replace"))
