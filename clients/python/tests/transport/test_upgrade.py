"""From TCP to WebSocket, and every way in which that is refused."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from muond import MuondError
from muond.connection import Connection
from muond.transport.address import endpoint
from muond.transport.upgrade import _upgrade, dial
from peer import Peer, Web
from service import Service, keys_file


def refused(url: str, **options: str) -> MuondError:
    with pytest.raises(MuondError) as caught:
        dial(endpoint(url, **options))  # type: ignore[arg-type]
    return caught.value


def answering(answer: bytes) -> tuple[str, Callable[[], None]]:
    """A server that says these bytes to whoever connects and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connected, _ = listener.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += connected.recv(1 << 16)
        connected.sendall(answer)
        # A socket that is closed with bytes unread resets the connection: the answer could be lost.
        connected.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            connected.recv(1)
        connected.close()

    thread = threading.Thread(target=serve)
    thread.start()

    def close() -> None:
        thread.join()
        listener.close()

    return f"ws://127.0.0.1:{listener.getsockname()[1]}", close


def test_nobody_there_is_said_with_the_address() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    error = refused(f"ws://127.0.0.1:{port}")
    assert error.code == "CONNECTION_LOST"
    assert error.retryable
    assert f"no connection to ws://127.0.0.1:{port}/v1/stream" in str(error)
    assert "is muond running there?" in str(error)


def test_a_host_that_does_not_exist_is_not_worth_a_retry() -> None:
    error = refused("ws://no.such.host.invalid")
    assert (error.code, error.retryable) == ("CONNECTION_LOST", False)


def test_a_wrong_key_is_unauthorized_and_the_right_one_is_in(start: Callable[..., Service], tmp_path: Path) -> None:
    scopes = {"right": ["step"], "reads": ["read"]}
    service = start("--keys-file", keys_file(tmp_path, scopes))
    assert refused(service.url).code == "UNAUTHORIZED"
    assert refused(service.url, token="wrong").code == "UNAUTHORIZED"
    unfit = refused(service.url, token="reads")
    assert unfit.code == "FORBIDDEN"
    assert "takes a key with the scope step; this one has read" in str(unfit)
    connection = Connection(endpoint(service.url, token="right"))
    connection.close(MuondError("CLIENT_CLOSED", "done"))


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (401, b"", "UNAUTHORIZED"),
        (403, b"no", "FORBIDDEN"),
        (404, b"[]", "NOT_FOUND"),
        (418, b"{", "REQUEST_INVALID"),
        (502, b"<html>", "CONNECTION_LOST"),
        (200, b"hello", "REQUEST_INVALID"),
    ],
)
def test_a_status_without_a_problem_says_what_it_can(status: int, body: bytes, code: str) -> None:
    with Web(status, body) as web:
        error = refused(web.url)
    assert (error.code, error.status) == (code, status)
    assert f"refused the connection with HTTP status {status}" in str(error)


def test_a_problem_document_is_the_error() -> None:
    problem = {"code": "OVERLOADED", "detail": "256 connections", "retryable": True}
    with Web(429, json.dumps(problem).encode(), {"Retry-After": "7"}) as web:
        error = refused(web.url)
    assert (error.code, error.retryable, error.fields.retry_after_seconds) == ("OVERLOADED", True, 7.0)
    assert "256 connections" in str(error)


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (b"", "CONNECTION_LOST", "closed the connection before it answered"),
        (b"HTTP/1.1 10", "CONNECTION_LOST", "closed the connection before it answered"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "FRAME_MALFORMED", "does not speak HTTP"),
        (b"HTTP/1.1 101 Fine\r\nSec-WebSocket-Accept: abc\r\n\r\n", "FRAME_MALFORMED", "Sec-WebSocket-Accept abc"),
        (b"HTTP/1.1 101 Fine\r\n\r\n", "FRAME_MALFORMED", "Sec-WebSocket-Accept None"),
        (b"x" * 70_000, "FRAME_MALFORMED", "more than 65536 bytes of headers"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 100\r\n\r\nshort", "CONNECTION_LOST", "HTTP status 503"),
    ],
)
def test_what_is_no_upgrade_is_refused(answer: bytes, code: str, words: str) -> None:
    url, close = answering(answer)
    error = refused(url)
    close()
    assert error.code == code
    assert words in str(error)


class ByteByByte:
    """A connection of which a read gives one byte."""

    def __init__(self, answer: bytes) -> None:
        self.left = answer

    def sendall(self, data: bytes) -> None:
        """Nobody reads it."""

    def recv_into(self, buffer: memoryview) -> int:
        given, self.left = self.left[:1], self.left[1:]
        buffer[: len(given)] = given
        return len(given)


@pytest.mark.parametrize("body", [b'{"code": "OVERLOADED", "detail": "full"}', b'{"code": "OVERLOADED", "detail": "fu'])
def test_an_answer_may_come_byte_by_byte_and_end_early(body: bytes) -> None:
    answer = b"HTTP/1.1 429 No\r\nContent-Length: 40\r\nRetry-After: 3\r\n\r\n" + body
    with pytest.raises(MuondError) as caught:
        _upgrade(ByteByByte(answer), endpoint("ws://127.0.0.1:1"))  # type: ignore[arg-type]
    assert caught.value.fields.retry_after_seconds == 3
    assert caught.value.code == "OVERLOADED"
    assert str(caught.value).partition(" [")[0].endswith("full" if len(body) == 40 else "HTTP status 429")


def test_an_extension_that_nobody_offered_is_refused() -> None:
    def choose(_socket: object, _request: object, response: object) -> None:
        response.headers["Sec-WebSocket-Extensions"] = "permessage-deflate"  # type: ignore[attr-defined]

    with Peer(lambda talk: talk.until_closed(), process_response=choose) as peer:
        assert "extensions that nobody offered" in str(refused(peer.url))


def test_key_and_headers_are_sent_and_bytes_behind_the_answer_are_kept() -> None:
    seen: dict[str, str] = {}

    def look(_socket: object, request: object) -> None:
        seen.update(request.headers.raw_items())  # type: ignore[attr-defined]

    def script(talk: object) -> None:
        talk.say(type="draining", deadline_seconds=1)  # type: ignore[attr-defined]
        talk.until_closed()  # type: ignore[attr-defined]

    with Peer(script, process_request=look) as peer:
        upgraded = dial(endpoint(peer.url, token="abc", headers={"X-Team": "one"}))
        upgraded.socket.close()
    assert seen["Authorization"] == "Bearer abc"
    assert seen["X-Team"] == "one"


def test_a_socket_error_during_the_upgrade_is_a_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muond.transport.upgrade.HANDSHAKE_SECONDS", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))
    error = refused(f"ws://127.0.0.1:{listener.getsockname()[1]}")
    listener.close()
    assert error.code == "CONNECTION_LOST"
    assert "timed out" in str(error)
