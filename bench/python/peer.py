"""The other end of a measured client, in a process of its own: takes or gives bytes as fast as it can.

`python peer.py KIND MODE CONGESTION` listens on a free port, prints it, and serves one connection. KIND is `raw` (bytes
without a form), `messages` (a WebSocket, whatever is in its messages) or `service` (the frames of a step, with empty
tensors). MODE is `send`, `receive` or `both`, as the client sees it. CONGESTION is the kernel's congestion control,
`default` for its own choice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import socket
import struct
import sys
from typing import Any

from muond.wire.msgpack import decode, decode_head, encode, encode_head

from workload import CHUNK_BYTES, OPENED, PARAMETER_BYTES, PARAMETERS, STEPS, Mode

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BINARY, _CLOSE = 0x2, 0x8
# More than the keys of any frame before its data.
_HEAD_BYTES = 1 << 10


def main(kind: str, mode: Mode, congestion: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    if congestion != "default":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "raw":
        _raw(connection, mode)
    else:
        talk = _Talk(connection)
        _messages(talk, mode) if kind == "messages" else _service(talk, mode)


def _raw(connection: socket.socket, mode: Mode) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    if mode == "receive":
        for _ in range(STEPS * PARAMETERS * PARAMETER_BYTES // CHUNK_BYTES):
            connection.sendall(buffer)
        return
    while (count := connection.recv_into(buffer)) > 0:
        if mode == "both":
            connection.sendall(buffer[:count])


class _Talk:
    """The serving half of a WebSocket. Masks are not taken off: nobody reads the bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._incoming = io.BufferedReader(socket.SocketIO(connection, "r"), 1 << 16)
        self.buffer = memoryview(bytearray(CHUNK_BYTES + _HEAD_BYTES))
        key = b""
        while (line := self._incoming.readline().strip()) != b"":
            name, _, value = line.partition(b":")
            if name.lower() == b"sec-websocket-key":
                key = value.strip()
        accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())
        lines = [b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", b"Connection: Upgrade"]
        connection.sendall(b"\r\n".join([*lines, b"Sec-WebSocket-Accept: " + accept, b"", b""]))

    def hear(self) -> memoryview | None:
        """The next message, in memory that the one after it uses too; None when there is none any more."""
        head = self._incoming.read(2)
        if len(head) < 2 or head[0] & 0x0F == _CLOSE:
            return None
        length = head[1] & 0x7F
        if length >= 126:
            form = ">H" if length == 126 else ">Q"
            (length,) = struct.unpack(form, self._incoming.read(struct.calcsize(form)))
        self._incoming.read(4)
        into = self.buffer[:length]
        while len(into) > 0:
            into = into[self._incoming.readinto(into) :]
        return self.buffer[:length]

    def say(self, head: bytes, data: memoryview | None = None) -> None:
        """One message; with data in two fragments and one system call, as the service does."""
        if data is None:
            return self._connection.sendall(_header(0x80 | _BINARY, len(head)) + head)
        first = _header(_BINARY, len(head)) + head + _header(0x80, len(data))
        sent = self._connection.sendmsg([first, data])
        if sent < len(first) + len(data):
            self._connection.sendall(data[sent - len(first) :])
        return None


def _header(first: int, length: int) -> bytes:
    if length < 126:
        return struct.pack(">BB", first, length)
    return struct.pack(">BBH", first, 126, length) if length < 1 << 16 else struct.pack(">BBQ", first, 127, length)


def _messages(talk: _Talk, mode: Mode) -> None:
    while (message := talk.hear()) is not None:
        if mode == "both":
            talk.say(b"", message)
        elif mode == "receive":
            for _ in range(STEPS * PARAMETERS * PARAMETER_BYTES // CHUNK_BYTES):
                talk.say(b"", talk.buffer[:CHUNK_BYTES])


def _service(talk: _Talk, mode: Mode) -> None:
    while (message := talk.hear()) is not None:
        found = decode_head(message[:_HEAD_BYTES]) if len(message) >= CHUNK_BYTES else None
        frame = decode(message) if found is None else found[0]
        if frame["type"] == "open":
            talk.say(encode(OPENED))
        elif frame["type"] == "gradient":
            assert found is not None
            _answer(talk, frame, found[2], mode)
        else:
            if mode == "receive":
                for parameter in range(PARAMETERS):
                    for offset in range(0, PARAMETER_BYTES, CHUNK_BYTES):
                        _update(talk, parameter, frame["step"], offset, talk.buffer[:CHUNK_BYTES])
            talk.say(encode(_receipt(frame["step"])))


def _answer(talk: _Talk, gradient: dict[str, Any], length: int, mode: Mode) -> None:
    parameter, step, offset = gradient["parameter"], gradient["step"], gradient["offset"]
    if mode == "both":
        _update(talk, parameter, step, offset, talk.buffer[:length])
    elif offset + length == PARAMETER_BYTES:
        _update(talk, parameter, step, 0, None)


def _update(talk: _Talk, parameter: int, step: int, offset: int, data: memoryview | None) -> None:
    frame: dict[str, Any] = {"type": "update", "parameter": parameter, "step": step, "offset": offset}
    if offset == 0:
        frame.update(scale=-1.0, decay=0.0, replayed=False, gradient_norm=1.0, update_rms=1.0)
    talk.say(encode(frame) if data is None else encode_head(frame, len(data)), data)


def _receipt(step: int) -> dict[str, Any]:
    seconds = {"receive": 0.0, "queue": 0.0, "compute": 0.0, "send": 0.0}
    return {
        "type": "receipt",
        "step": step,
        "replayed": False,
        "applied": PARAMETERS,
        "skipped": 0,
        "gradient_norm": 1.0,
        "groups": OPENED["groups"],
        "clipped_heads": {},
        "digest": str(step),
        "durable": False,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])  # type: ignore[arg-type]
