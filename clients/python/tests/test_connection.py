"""One connection: its end has one reason, whoever caused it, and everybody who waits hears it."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable

import pytest

from muond import MuondError
from muond.connection import Connection, Listener
from muond.transport.address import endpoint
from muond.wire.frame import Frame
from muond.wire.msgpack import encode, encode_head
from peer import ERROR, OPENED, UPDATE, Peer, Talk

DONE = MuondError("CLIENT_CLOSED", "done")


class Heard(Listener):
    """Keeps what it hears."""

    def __init__(self, act: Callable[[Frame], None] = lambda _: None) -> None:
        self.frames: list[Frame] = []
        self.reason: BaseException | None = None
        self.over = threading.Event()
        self.act = act

    def frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.act(frame)

    def closed(self, reason: BaseException) -> None:
        self.reason = reason
        self.over.set()


def code(error: BaseException | None) -> str:
    assert isinstance(error, MuondError)
    return error.code


@pytest.mark.parametrize(
    ("close", "expected"),
    [
        (1000, "CONNECTION_LOST"),
        (1002, "FRAME_MALFORMED"),
        (1009, "FRAME_TOO_LARGE"),
        (1011, "INTERNAL"),
        (1012, "CONNECTION_LOST"),
        (1013, "CONNECTION_LOST"),
        (4409, "TAKEN_OVER"),
    ],
)
def test_a_close_code_is_an_error(close: int, expected: str) -> None:
    with Peer(lambda talk: talk.socket.close(close, "because")) as peer:
        connection = Connection(endpoint(peer.url))
        heard = Heard()
        connection.listen(heard)
        assert heard.over.wait(10)
        assert code(heard.reason) == expected
        assert "because" in str(heard.reason)
        with pytest.raises(MuondError) as caught:
            connection.send({"type": "end"})
        assert caught.value is heard.reason


def test_a_listener_that_comes_late_hears_the_end_as_well() -> None:
    with Peer(lambda talk: None) as peer:
        connection = Connection(endpoint(peer.url))
        first, second = Heard(), Heard()
        connection.listen(first)
        assert first.over.wait(10)
        connection.listen(second)
        assert second.reason is first.reason
        connection.listen()


def test_what_a_listener_raises_ends_the_connection_with_that_error() -> None:
    def script(talk: Talk) -> None:
        talk.hear()
        talk.say(**OPENED)
        talk.until_closed()

    def raises(_: Frame) -> None:
        raise KeyError("mine")

    with Peer(script) as peer:
        heard = Heard(raises)
        connection = Connection(endpoint(peer.url))
        connection.listen(heard)
        connection.send({"type": "end"})
        assert heard.over.wait(10)
    assert isinstance(heard.reason, KeyError)


def test_between_steps_an_error_ends_the_connection_and_draining_does_not() -> None:
    def script(talk: Talk) -> None:
        talk.say(type="draining", deadline_seconds=1)
        talk.say(**ERROR)
        talk.until_closed()

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        connection._thread.join(10)
        assert code(connection.reason) == "INTERNAL"


def test_between_steps_any_other_frame_is_unexpected() -> None:
    def script(talk: Talk) -> None:
        talk.say(**OPENED)
        talk.until_closed()

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        connection._thread.join(10)
        assert code(connection.reason) == "FRAME_UNEXPECTED"
        assert "opened outside a step" in str(connection.reason)


def test_between_steps_there_is_no_memory_for_an_update() -> None:
    def script(talk: Talk) -> None:
        talk.say_in_fragments(encode_head(UPDATE, 4), b"1234")
        talk.until_closed()

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        connection._thread.join(10)
        assert "update outside a step" in str(connection.reason)


def test_a_close_in_order_says_so_to_the_service() -> None:
    closed: list[int | None] = []

    def script(talk: Talk) -> None:
        talk.until_closed()
        closed.append(talk.socket.protocol.close_code)

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        connection.close(DONE)
        connection.close(DONE)
        assert connection.reason is DONE
    assert closed == [1000]


def test_what_comes_after_the_end_has_a_reason_is_for_nobody() -> None:
    def script(talk: Talk) -> None:
        assert talk.hear() == {"type": "end"}
        talk.say(**OPENED)
        talk.say_in_fragments(encode_head(UPDATE, 4), b"1234")

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        heard = Heard()
        connection.listen(heard)
        connection._because(DONE)
        connection._sender.message(encode({"type": "end"}))
        assert heard.over.wait(10)
        assert (heard.frames, heard.reason) == ([], DONE)


def test_a_failed_connection_is_gone_at_once_and_receives_nothing_any_more() -> None:
    with Peer(lambda talk: talk.until_closed()) as peer:
        connection = Connection(endpoint(peer.url))
        heard = Heard()
        connection.listen(heard)
        connection.fail(DONE)
        assert heard.reason is DONE


def test_a_send_into_a_broken_connection_raises_the_reason_that_the_service_gave() -> None:
    def script(talk: Talk) -> None:
        talk.hear()
        talk.say(**{**ERROR, "code": "FRAME_UNEXPECTED"})
        talk.socket.close(1002)

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        large = memoryview(bytes(1 << 20))

        def send_for_ever() -> None:
            while True:
                connection.send_data({"type": "gradient"}, large)

        with pytest.raises(MuondError) as caught:
            send_for_ever()
        assert caught.value.code == "FRAME_UNEXPECTED"


def test_a_reset_is_a_lost_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted, _ = listener.accept()
            request = accepted.recv(1 << 16)
            key = request.split(b"Sec-WebSocket-Key: ")[1].split(b"\r\n")[0]
            accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            accepted.sendall(b"HTTP/1.1 101 Yes\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n")
            accepted.recv(1)
            # Closing without lingering, and with bytes unread, resets the connection.
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()

        thread = threading.Thread(target=serve)
        thread.start()
        connection = Connection(endpoint(f"ws://127.0.0.1:{listener.getsockname()[1]}"))
        heard = Heard()
        connection.listen(heard)
        connection.send({"type": "end"})
        assert heard.over.wait(10)
        thread.join()
    assert "the connection was lost: " in str(heard.reason)
    assert code(heard.reason) == "CONNECTION_LOST"


def test_pings_are_answered() -> None:
    answered = threading.Event()

    def script(talk: Talk) -> None:
        assert talk.socket.ping("hello").wait(10)
        answered.set()
        talk.until_closed()

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        assert answered.wait(10)
        connection.close(DONE)


def test_a_forked_child_does_not_end_its_parents_connection() -> None:
    def script(talk: Talk) -> None:
        assert talk.hear() == {"type": "end"}
        talk.say(**OPENED)
        talk.until_closed()

    with Peer(script) as peer:
        connection = Connection(endpoint(peer.url))
        child = os.fork()
        if child == 0:
            connection.close(DONE)
            connection.fail(DONE)
            os._exit(0)
        os.waitpid(child, 0)
        heard = Heard()
        answered = threading.Event()
        heard.act = lambda _: answered.set()
        connection.listen(heard)
        connection.send({"type": "end"})
        assert answered.wait(10)
        connection.close(DONE)
