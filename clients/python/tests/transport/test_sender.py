"""What goes onto the socket, read by another implementation of WebSocket."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muond.transport.sender import Sender


class Socket:
    """A socket that takes at most so many bytes of a message at once, and keeps them."""

    def __init__(self, first: int = 1 << 30) -> None:
        self.sent = bytearray()
        self.first = first

    def sendall(self, data: bytes | memoryview) -> None:
        self.sent += data

    def sendmsg(self, parts: list[bytes | memoryview]) -> int:
        joined = b"".join(parts)[: self.first]
        self.sent += joined
        return len(joined)


def read(stream: bytes) -> list[tuple[int, bytes]]:
    """RFC 6455, section 5.2: (opcode, payload) of every frame, all of which are final and masked."""
    frames = []
    while stream:
        assert stream[0] & 0xF0 == 0x80
        assert stream[1] & 0x80
        length, at = stream[1] & 0x7F, 2
        if length >= 126:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(stream[2 : 2 + size], "big"), 2 + size
        mask, payload = stream[at : at + 4], stream[at + 4 : at + 4 + length]
        frames.append((stream[0] & 0x0F, bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))))
        stream = stream[at + 4 + length :]
    return frames


@given(
    st.binary(max_size=300),
    st.none() | st.integers(0, 3000) | st.integers(65_000, 70_000),
    st.booleans(),
    st.sampled_from([1, 3, 10, 100, 1 << 30]),
)
def test_a_message_is_one_frame_of_head_and_payload(head: bytes, length: int | None, masked: bool, first: int) -> None:
    payload = None if length is None else np.random.default_rng(1).bytes(length)
    socket = Socket(first)
    sender = Sender(socket, masked=masked)  # type: ignore[arg-type]
    for _ in range(2):
        sender.message(head, None if payload is None else memoryview(payload))
    assert read(bytes(socket.sent)) == [(2, head + (payload or b""))] * 2


def test_a_mask_is_new_for_every_message_and_none_where_nobody_is_on_the_way() -> None:
    socket = Socket()
    Sender(socket, masked=True).message(b"same")  # type: ignore[arg-type]
    Sender(socket, masked=True).message(b"same")  # type: ignore[arg-type]
    assert socket.sent[:10] != socket.sent[10:]
    plain = Socket()
    Sender(plain, masked=False).message(b"same")  # type: ignore[arg-type]
    assert plain.sent == b"\x82\x84\x00\x00\x00\x00same"


def test_masking_leaves_the_payload_as_it_was() -> None:
    payload = np.arange(1000, dtype=np.float32)
    Sender(Socket(), masked=True).message(b"abc", payload.view(np.uint8).data)  # type: ignore[arg-type]
    assert np.array_equal(payload, np.arange(1000, dtype=np.float32))


class Gate(Socket):
    """A socket on which a message waits until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()
        self.open = threading.Event()

    def sendmsg(self, parts: list[bytes | memoryview]) -> int:
        self.waits.set()
        assert self.open.wait(10)
        return super().sendmsg(parts)


def test_a_ping_during_a_message_is_answered_behind_it_and_never_waited_for() -> None:
    socket = Gate()
    sender = Sender(socket, masked=False)  # type: ignore[arg-type]
    thread = threading.Thread(target=sender.message, args=(b"head", memoryview(b"payload")))
    thread.start()
    assert socket.waits.wait(10)
    sender.pong(b"one")
    sender.pong(b"two")
    assert not sender.close(1000, 0)
    socket.open.set()
    thread.join()
    sender.pong(b"three")
    assert sender.close(1000, 1)
    frames = [(2, b"headpayload"), (10, b"one"), (10, b"two"), (10, b"three"), (8, b"\x03\xe8")]
    assert read(bytes(socket.sent)) == frames


def test_a_close_on_a_socket_that_is_gone_says_so() -> None:
    class Gone(Socket):
        def sendall(self, data: bytes | memoryview) -> None:
            raise BrokenPipeError

    sender = Sender(Gone(), masked=False)  # type: ignore[arg-type]
    assert not sender.close(1000, 1)
    with pytest.raises(BrokenPipeError):
        sender.message(b"x")
