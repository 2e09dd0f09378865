"""Messages as bytes, in every way that they can be cut into frames and reads."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muond import MuondError
from muond.transport import receiver as receiver_module
from muond.transport.receiver import Closed, Received, Receiver
from muond.wire.frame import Frame
from muond.wire.msgpack import encode, encode_head

UPDATE = {"type": "update", "parameter": 3, "step": 1, "offset": 0}
DRAINING = {"type": "draining", "deadline_seconds": 1.5}


class Bytes:
    """A socket that brings these bytes in pieces of these sizes, and then ends."""

    def __init__(self, data: bytes, sizes: Iterator[int]) -> None:
        self.data = data
        self.sizes = sizes

    def recv_into(self, view: memoryview) -> int:
        count = min(next(self.sizes), len(view), len(self.data))
        view[:count] = self.data[:count]
        self.data = self.data[count:]
        return count


class Sink:
    """Gives memory for updates, and remembers pings."""

    def __init__(self) -> None:
        self.memory: list[bytearray] = []
        self.pings: list[bytes] = []

    def destination(self, frame: Frame, length: int) -> memoryview | None:
        if frame["type"] != "update":
            return None
        self.memory.append(bytearray(length))
        return memoryview(self.memory[-1])

    def receiver(self, data: bytes, sizes: Sequence[int] = (1 << 20,), rest: int = 0) -> Receiver:
        source = Bytes(data[rest:], itertools.cycle(sizes))
        return Receiver(source, data[:rest], destination=self.destination, ping=self.pings.append)  # type: ignore[arg-type]


def frame(payload: bytes, opcode: int = 2, *, fin: bool = True, flags: int = 0) -> bytes:
    first = (0x80 if fin else 0) | opcode | flags
    if len(payload) < 126:
        return struct.pack(">BB", first, len(payload)) + payload
    if len(payload) < 1 << 16:
        return struct.pack(">BBH", first, 126, len(payload)) + payload
    return struct.pack(">BBQ", first, 127, len(payload)) + payload


def fragments(parts: Sequence[bytes]) -> bytes:
    last = len(parts) - 1
    return b"".join(frame(part, 0 if i else 2, fin=i == last) for i, part in enumerate(parts))


def update(length: int, **keys: object) -> tuple[bytes, bytes]:
    data = bytes(i * 7 & 0xFF for i in range(length))
    return encode_head({**UPDATE, **keys}, length), data


@given(
    st.lists(
        st.tuples(st.sampled_from(["whole", "two", "other", "ping"]), st.sampled_from([0, 1, 200, 40_000, 200_000])),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.sampled_from([1, 2, 7, 1000, 40_000, 1 << 20]), min_size=1, max_size=5),
    st.integers(0, 300),
)
def test_messages_arrive_whole_however_they_are_cut(
    messages: list[tuple[str, int]], sizes: list[int], rest: int
) -> None:
    if sum(sizes) < 100 * len(sizes):
        messages = [(kind, min(length, 200)) for kind, length in messages]
    stream = b""
    for kind, length in messages:
        head, data = update(length)
        stream += {
            "whole": frame(head + data),
            "two": fragments([head, data]),
            "other": frame(encode(DRAINING)),
            "ping": frame(b"p" * min(length, 125), 9),
        }[kind]
    sink = Sink()
    receiver = sink.receiver(stream, sizes, min(rest, len(stream)))
    expected = [(kind, length) for kind, length in messages if kind != "ping"]
    placed = 0
    for kind, length in expected:
        received = receiver.next()
        assert isinstance(received, Received)
        if kind == "other":
            assert received.frame == DRAINING
        elif received.placed:
            assert received.frame == UPDATE
            assert bytes(sink.memory[placed]) == update(length)[1]
            placed += 1
        else:
            assert received.frame == {**UPDATE, "data": update(length)[1]}
    assert receiver.next() == Closed(1006, "")
    assert sink.pings == [b"p" * min(length, 125) for kind, length in messages if kind == "ping"]


def test_large_updates_are_received_in_place_in_one_piece_or_two() -> None:
    for cut in (lambda head, data: frame(head + data), lambda head, data: fragments([head, data])):
        sink = Sink()
        received = sink.receiver(cut(*update(300_000))).next()
        assert isinstance(received, Received)
        assert received.placed


def test_row_scales_before_the_data_may_be_larger_than_the_scratch() -> None:
    rows = bytes(200_000)
    for cut in (lambda head, data: frame(head + data), lambda head, data: fragments([head, data])):
        received = Sink().receiver(cut(*update(100_000, row_scale=rows))).next()
        assert isinstance(received, Received)
        assert received.frame["row_scale"] == rows
        # In one piece its data was on the way before the keys were known: then it is a copy in the frame.
        assert received.placed or received.frame["data"] == update(100_000)[1]


def test_a_control_frame_may_stand_between_the_fragments() -> None:
    head, data = update(1000)
    sink = Sink()
    received = sink.receiver(frame(head, fin=False) + frame(b"hi", 9) + frame(b"", 10) + frame(data, 0)).next()
    assert received == Received(UPDATE, placed=True)
    assert (bytes(sink.memory[0]), sink.pings) == (data, [b"hi"])


def test_many_small_fragments_are_collected() -> None:
    message = encode(DRAINING)
    received = Sink().receiver(fragments([message[i : i + 1] for i in range(len(message))])).next()
    assert received == Received(DRAINING, placed=False)


@pytest.mark.parametrize(
    ("payload", "closed"),
    [
        (b"", Closed(1005, "")),
        (b"\x03", Closed(1005, "")),
        (struct.pack(">H", 4409) + b"taken", Closed(4409, "taken")),
        (struct.pack(">H", 1000) + b"\xff", Closed(1000, "\ufffd")),
    ],
)
def test_a_close_frame_ends_it(payload: bytes, closed: Closed) -> None:
    assert Sink().receiver(frame(payload, 8)).next() == closed


HEAD, DATA = update(100)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (frame(b"hi", 1), "a text message"),
        (frame(b"hi", 0), "a frame 0x0 outside a message"),
        (frame(HEAD, fin=False) + frame(HEAD), "a frame 0x2 inside a message"),
        (frame(b"", 3), "a frame 0x3 outside a message"),
        (frame(b"", 11), "of an unknown kind"),
        (frame(b"", 9, fin=False), "in pieces"),
        (frame(b"x" * 126, 9), "too long"),
        (frame(b"", flags=0x40), "reserved bits"),
        (b"\x82\x80abcd", "masked frame"),
        (fragments([HEAD, DATA + b"x"]), "101 bytes of data where 100 were left"),
        (fragments([HEAD + DATA, b"x"]), "1 bytes of data where 0 were left"),
        (fragments([HEAD, DATA[1:]]), "update with 1 bytes of data less"),
        (fragments([b"\x81\xa1a\xc0", b"x"]), "nil and extensions"),
        (fragments([encode({**UPDATE, "step": -1, "data": b""}), b"x"]), "update.step = -1"),
        (fragments([encode(DRAINING), b"x"]), "1 bytes after the map"),
        (frame(encode({"type": 1})), "a frame of type 1"),
    ],
)
def test_what_breaks_the_rules_is_malformed(stream: bytes, words: str) -> None:
    with pytest.raises(MuondError, match=words) as caught:
        Sink().receiver(stream).next()
    assert caught.value.code == "FRAME_MALFORMED"


def test_messages_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MuondError, match="a frame of 9223372036854775807 bytes") as caught:
        Sink().receiver(b"\x82\x7f" + struct.pack(">Q", 2**63 - 1)).next()
    assert caught.value.code == "FRAME_TOO_LARGE"
    monkeypatch.setattr(receiver_module, "MESSAGE_BYTES", 1000)
    with pytest.raises(MuondError, match="a message of more than 1000 bytes"):
        Sink().receiver(fragments([b"\x80" * 600, b"\x80" * 600])).next()


def test_the_end_of_the_socket_in_the_middle_is_a_lost_connection() -> None:
    stream = fragments([HEAD, DATA])
    for end in range(0, len(stream), 7):
        assert Sink().receiver(stream[:end]).next() == Closed(1006, "")
