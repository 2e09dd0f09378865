"""One measurement of a client, in a process of its own, so that its CPU seconds are its own.

`python client.py CLIENT MODE PORT` prints a line of JSON. CLIENT is `raw` (sockets and nothing else), `muond` (the
package's run, with nothing done to the updates) or `websockets` (that package, with messages made beforehand).
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from workload import CHUNK_BYTES, PARAMETER_BYTES, PARAMETERS, SHAPE, STEPS, TIMED_BYTES, Mode

_CHUNKS = PARAMETERS * PARAMETER_BYTES // CHUNK_BYTES
_Mark = Callable[[], None]
# No compression and no pings: they would cost time.
_OPTIONS: dict[str, Any] = {"compression": None, "max_size": None, "ping_interval": None}


def main(client: str, mode: Mode, port: int) -> None:
    marks: list[tuple[float, float, float]] = []

    def mark() -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        marks.append((time.perf_counter(), usage.ru_utime, usage.ru_stime))

    {"raw": _raw, "muond": _muond, "websockets": _websockets}[client](mode, port, mark)
    (begun, user, system), (ended, user_then, system_then) = marks
    moved = TIMED_BYTES * (2 if mode == "both" else 1)
    print(
        json.dumps(
            {
                "seconds": ended - begun,
                "user_seconds": user_then - user,
                "system_seconds": system_then - system,
                "bytes": moved,
            }
        )
    )


def connected(port: int) -> socket.socket:
    """A socket to the peer, connected as the package connects to loopback."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return connection


def chunks() -> list[memoryview]:
    """The tensors of a step, each with memory of its own, all of which was touched."""
    return [memoryview(np.ones(CHUNK_BYTES, np.uint8)) for _ in range(_CHUNKS)]


def _raw(mode: Mode, port: int, mark: _Mark) -> None:
    connection = connected(port)

    def send() -> None:
        for chunk in outgoing:
            connection.sendall(chunk)

    def receive() -> None:
        for chunk in incoming:
            view = chunk
            while len(view) > 0:
                view = view[connection.recv_into(view) :]

    outgoing, incoming = chunks(), chunks()
    _steps(mode, send, receive, mark)


def _websockets(mode: Mode, port: int, mark: _Mark) -> None:
    if mode == "both":
        # Its other API receives nothing while a message is on its way out: with an echo both ends would wait for ever.
        asyncio.run(_websockets_asyncio(port, mark))
        return
    from websockets.sync.client import connect

    outgoing = _messages()
    with connect(f"ws://127.0.0.1:{port}", sock=connected(port), **_OPTIONS) as connection:

        def send() -> None:
            for message in outgoing:
                connection.send(message)

        def receive() -> None:
            for _ in outgoing:
                connection.recv()

        if mode == "receive":
            connection.send(b"begin")
        _steps(mode, send, receive, mark)


async def _websockets_asyncio(port: int, mark: _Mark) -> None:
    from websockets.asyncio.client import connect

    outgoing = _messages()
    async with connect(f"ws://127.0.0.1:{port}", sock=connected(port), **_OPTIONS) as connection:

        async def send() -> None:
            for message in outgoing:
                await connection.send(message)

        async def receive() -> None:
            for _ in outgoing:
                await connection.recv()

        for step in range(STEPS):
            if step == 1:
                mark()
            await asyncio.gather(send(), receive())
        mark()


def _messages() -> list[bytes]:
    return [bytes(chunk) for chunk in chunks()]


def _steps(mode: Mode, send: Callable[[], None], receive: Callable[[], None], mark: _Mark) -> None:
    """Runs one step after the other, as in training; within a step both directions move at the same time."""
    for step in range(STEPS):
        if step == 1:
            mark()
        if mode == "both":
            thread = threading.Thread(target=receive)
            thread.start()
            send()
            thread.join()
        elif mode == "send":
            send()
        else:
            receive()
    mark()


def _muond(mode: Mode, port: int, mark: _Mark) -> None:
    import muond

    gradients = [memoryview(np.ones(PARAMETER_BYTES, np.uint8)) for _ in range(PARAMETERS)]
    parameters = [
        muond.Parameter(f"w{index}", "all", shape=SHAPE, gradient_dtype="bfloat16", update_dtype="bfloat16")
        for index in range(PARAMETERS)
    ]
    groups = [{"name": "all", "algorithm": "sgd"}]
    with muond.open_run(
        f"ws://127.0.0.1:{port}", run="bench", parameters=parameters, groups=groups, apply=lambda _: None
    ) as run:
        for step in range(STEPS):
            if step == 1:
                mark()
            if mode == "receive":
                # The peer sends updates for them all the same.
                run.end(skipped=range(PARAMETERS))
                continue
            for index, gradient in enumerate(gradients):
                run.gradient_bytes(index, gradient)
            run.end()
        mark()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))  # type: ignore[arg-type]
