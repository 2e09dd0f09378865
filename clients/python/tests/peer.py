"""A peer that says what a test tells it to, also what no service says. It speaks WebSocket through the websockets package."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgpack
import websockets
from websockets.sync.server import Server, ServerConnection, serve

Script = Callable[["Talk"], None]


class Talk:
    """One connection of a peer."""

    def __init__(self, socket: ServerConnection, number: int) -> None:
        self.socket = socket
        self.number = number

    def hear(self) -> dict[str, Any]:
        """The next frame of the client."""
        message: dict[str, Any] = msgpack.unpackb(self.socket.recv())
        return message

    def say(self, **frame: Any) -> None:
        self.socket.send(msgpack.packb(frame))

    def say_in_fragments(self, *parts: bytes) -> None:
        self.socket.send(iter(parts))

    def opened(self, **changes: Any) -> None:
        """Hears `open` and answers for a run with the parameter `w` of two elements."""
        assert self.hear()["type"] == "open"
        self.say(**{**OPENED, **changes})

    def until_closed(self) -> None:
        """Listens until the client ends the connection."""
        try:
            while True:
                self.socket.recv()
        except websockets.ConnectionClosed:
            pass


OPENED: dict[str, Any] = {
    "type": "opened",
    "run": "r",
    "epoch": 1,
    "step": 0,
    "resumed": False,
    "digest": "d0",
    "ahead": [],
    "attentions": [],
    "groups": {"all": {"algorithm": "sgd", "lr": 1.0}},
    "limits": {"chunk_bytes": 1 << 22},
    "server": {"name": "peer", "version": "0", "device": "none"},
}
UPDATE: dict[str, Any] = {"type": "update", "parameter": 0, "step": 1, "offset": 0, "scale": -1.0, "decay": 0.0}
RECEIPT: dict[str, Any] = {
    "type": "receipt",
    "step": 1,
    "replayed": False,
    "applied": 1,
    "skipped": 0,
    "gradient_norm": 1.0,
    "groups": {"all": {"algorithm": "sgd", "lr": 1.0}},
    "clipped_heads": {},
    "digest": "d1",
    "durable": False,
    "seconds": {"receive": 0.0, "queue": 0.0, "compute": 0.0, "send": 0.0},
}
ERROR: dict[str, Any] = {"type": "error", "code": "INTERNAL", "message": "broken", "status": 500, "retryable": False}


class Peer:
    """Plays the script for every connection, in a thread each; what a script raises is raised by `close`."""

    def __init__(self, script: Script, **options: Any) -> None:
        self.connections = 0
        self._failures: list[BaseException] = []
        self._script = script
        options = {"compression": None, "ping_interval": None, "max_size": None, **options}
        self._server: Server = serve(self._handle, "127.0.0.1", 0, **options)
        self.port = self._server.socket.getsockname()[1]
        scheme = "wss" if "ssl" in options else "ws"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        if self._failures:
            raise self._failures[0]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def _handle(self, socket: ServerConnection) -> None:
        number, self.connections = self.connections, self.connections + 1
        try:
            self._script(Talk(socket, number))
        except websockets.ConnectionClosed:
            pass
        except BaseException as failure:  # noqa: BLE001 - told by close()
            self._failures.append(failure)


class Web:
    """A web server that answers every request alike, after those of `before`, and keeps what it was asked."""

    def __init__(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        before: Sequence[tuple[int, bytes, dict[str, str]]] = (),
    ) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        answers = itertools.chain(before, itertools.repeat((status, body, headers or {})))
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("content-length", 0))
                web.requests.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
                status, body, headers = next(answers)
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = "Content-Length" in headers

            do_PUT = do_DELETE = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"ws://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Web:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._server.shutdown()
        self._server.server_close()
