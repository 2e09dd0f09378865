"""From a TCP connection to a WebSocket: dialling and the upgrade of RFC 6455, section 4."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any, Protocol

from ..error import ErrorFields, MuondError
from .address import Endpoint
from .tls import TlsSocket

HANDSHAKE_SECONDS = 30
# The kernel probes a silent peer; it answers even while the service has paused reading, which a WebSocket ping does not survive.
KEEPALIVE_SECONDS = 30
_HEAD_BYTES = 1 << 16
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# Statuses of an upgrade refused by something that does not speak problem+json, such as a proxy.
_STATUS_CODES = {401: "UNAUTHORIZED", 403: "FORBIDDEN", 404: "NOT_FOUND", 429: "OVERLOADED"}


class ByteSocket(Protocol):
    """What a connection needs of its socket; ``socket.socket`` has it."""

    def settimeout(self, seconds: float | None, /) -> None: ...
    def recv_into(self, buffer: memoryview, /) -> int: ...
    def sendall(self, data: bytes | memoryview, /) -> None: ...
    def sendmsg(self, parts: list[bytes | memoryview], /) -> int: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Upgraded:
    """A socket on which only WebSocket frames follow, and those bytes of theirs that came with the answer."""

    socket: ByteSocket
    rest: bytes


def dial(endpoint: Endpoint) -> Upgraded:
    """Connects and upgrades, within HANDSHAKE_SECONDS for each read.

    Raises MuondError UNAUTHORIZED, FORBIDDEN or what else the service answers; CONNECTION_LOST where there is no answer.
    """
    connected = _connect(endpoint)
    try:
        upgraded = _upgrade(connected, endpoint)
        connected.settimeout(None)
    except OSError as error:
        connected.close()
        raise _lost(endpoint, error) from error
    except BaseException:
        connected.close()
        raise
    return upgraded


def connect_unix(path: str, seconds: float) -> socket.socket:
    """Connects to a Unix socket, within so many seconds for that and for each later read. Raises OSError."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(seconds)
        connected.connect(path)
    except OSError:
        connected.close()
        raise
    return connected


def _connect(endpoint: Endpoint) -> ByteSocket:
    if endpoint.socket_path is not None:
        try:
            return connect_unix(endpoint.socket_path, HANDSHAKE_SECONDS)
        except OSError as error:
            raise _lost(endpoint, error) from error
    try:
        raw = socket.create_connection((endpoint.host, endpoint.port), HANDSHAKE_SECONDS)
    except OSError as error:
        raise _lost(endpoint, error) from error
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # pragma: no branch - Linux has it
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
    if endpoint.is_loopback and hasattr(socket, "TCP_CONGESTION"):  # pragma: no branch - Linux has it
        # bbr paces even on loopback, where cubic is two to three times faster; a kernel without it keeps its own.
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    if not endpoint.tls:
        return raw
    try:
        return TlsSocket(raw, endpoint.ssl_context or ssl.create_default_context(), endpoint.host)
    except OSError as error:  # ssl.SSLError is one
        raw.close()
        raise _lost(endpoint, error) from error


def _lost(endpoint: Endpoint, error: OSError) -> MuondError:
    hint = ": is muond running there?" if isinstance(error, (ConnectionRefusedError, FileNotFoundError)) else ""
    # A certificate does not become right by waiting, a service that starts up does come.
    retryable = not isinstance(error, (ssl.SSLError, socket.gaierror))
    return MuondError("CONNECTION_LOST", f"no connection to {endpoint.url}: {error}{hint}", retryable=retryable)


def _upgrade(connected: ByteSocket, endpoint: Endpoint) -> Upgraded:
    key = base64.b64encode(os.urandom(16))
    connected.sendall(_request(endpoint, key))
    head, rest = _read_head(connected, endpoint)
    status, headers = _parse_head(head, endpoint)
    if status != 101:
        raise _refused(status, headers, rest + _read_body(connected, headers, len(rest)), endpoint)
    expected = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
    accept = headers.get("sec-websocket-accept")
    if accept != expected:
        raise MuondError(
            "FRAME_MALFORMED", f"{endpoint.url} answered Sec-WebSocket-Accept {accept}, expected {expected}"
        )
    if headers.get("sec-websocket-extensions"):
        raise MuondError("FRAME_MALFORMED", f"{endpoint.url} chose extensions that nobody offered")
    return Upgraded(connected, rest)


def _request(endpoint: Endpoint, key: bytes) -> bytes:
    lines = [
        f"GET {endpoint.path} HTTP/1.1",
        f"Host: {endpoint.host_header}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key.decode()}",
        "Sec-WebSocket-Version: 13",
        *([f"Authorization: Bearer {endpoint.token}"] if endpoint.token is not None else []),
        *(f"{name}: {value}" for name, value in endpoint.headers.items()),
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


def _read_head(connected: ByteSocket, endpoint: Endpoint) -> tuple[bytes, bytes]:
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        if len(received) > _HEAD_BYTES:
            raise MuondError(
                "FRAME_MALFORMED", f"{endpoint.url} answered with more than {_HEAD_BYTES} bytes of headers"
            )
        received += _read(connected, endpoint)
    return bytes(received[:end]), bytes(received[end + 4 :])


def _read(connected: ByteSocket, endpoint: Endpoint) -> bytes:
    piece = bytearray(1 << 14)
    count = connected.recv_into(memoryview(piece))
    if count == 0:
        raise MuondError("CONNECTION_LOST", f"{endpoint.url} closed the connection before it answered")
    return bytes(piece[:count])


def _parse_head(head: bytes, endpoint: Endpoint) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    if not version.startswith("HTTP/1.") or not status[:3].isdigit():
        raise MuondError("FRAME_MALFORMED", f"{endpoint.url} does not speak HTTP, it answered '{first[:80]}'")
    pairs = (line.partition(":") for line in lines)
    return int(status[:3]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _read_body(connected: ByteSocket, headers: dict[str, str], have: int) -> bytes:
    length = headers.get("content-length", "")
    wanted = min(int(length) if length.isdigit() else _HEAD_BYTES, _HEAD_BYTES) - have
    body = bytearray()
    piece = bytearray(1 << 14)
    while len(body) < wanted:
        count = connected.recv_into(memoryview(piece))
        if count == 0:
            break
        body += piece[:count]
    return bytes(body)


def _refused(status: int, headers: dict[str, str], body: bytes, endpoint: Endpoint) -> MuondError:
    """The error of an upgrade that was answered with an ordinary HTTP response: RFC 9457, or whatever a proxy has to say."""
    return problem_error(status, body, headers.get("retry-after"), f"{endpoint.url} refused the connection")


def problem_error(status: int, body: bytes, retry_after: str | None, what: str) -> MuondError:
    problem = _problem(body)
    code = problem.get("code")
    if not isinstance(code, str):
        code = _STATUS_CODES.get(status, "REQUEST_INVALID" if status < 500 else "CONNECTION_LOST")
    detail = problem.get("detail")
    message = f"{what}: {detail}" if isinstance(detail, str) else f"{what} with HTTP status {status}"
    seconds = float(retry_after) if retry_after is not None and retry_after.isdigit() else None
    retryable = problem.get("retryable")
    return MuondError(
        code,
        message,
        ErrorFields(retry_after_seconds=seconds),
        status=status,
        retryable=retryable if isinstance(retryable, bool) else None,
    )


def _problem(body: bytes) -> dict[str, Any]:
    try:
        problem = json.loads(body)
    except ValueError:  # a body that is not JSON has nothing to add to the status
        return {}
    return problem if isinstance(problem, dict) else {}
