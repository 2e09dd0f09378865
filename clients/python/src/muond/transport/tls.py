"""A TLS socket that two threads may use at once, one to send and one to receive."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TlsSocket:
    """What the connection needs of a socket, over TLS.

    OpenSSL does not allow one session in two threads at the same time, and a blocking read would hold a lock for ever: every
    call on the session is short and under a lock, and waiting is done outside of it.
    """

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, host: str) -> None:
        # The handshake happens here, still blocking and under the caller's timeout.
        self._socket = context.wrap_socket(raw, server_hostname=host)
        self._lock = threading.Lock()

    def settimeout(self, seconds: float | None) -> None:
        # After the upgrade there is no timeout, and from then on nothing blocks but select.
        self._socket.settimeout(0.0 if seconds is None else seconds)

    def recv_into(self, buffer: memoryview) -> int:
        return self._when_ready(lambda: self._socket.recv_into(buffer))

    def sendall(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view) > 0:
            # A record has 16 KiB at most; larger pieces only save turns of this loop.
            sent = self._when_ready(lambda piece=view[: 1 << 18]: self._socket.send(piece))  # type: ignore[misc]
            view = view[sent:]

    def sendmsg(self, parts: list[bytes | memoryview]) -> int:
        for part in parts:
            self.sendall(part)
        return sum(len(memoryview(part).cast("B")) for part in parts)

    def shutdown(self, how: int) -> None:
        # Below TLS, so that it works while the other thread is inside the session.
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        self._socket.close()

    def _when_ready(self, act: Callable[[], T]) -> T:
        while True:
            try:
                with self._lock:
                    return act()
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)

    def _wait(self, events: int) -> None:
        poller = select.poll()
        poller.register(self._socket, events)
        poller.poll()
