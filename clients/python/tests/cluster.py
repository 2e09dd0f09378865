"""Several services that know each other, so that a run is spread over them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from service import Service

# The key that the processes show each other; nobody else is asked for one.
_KEY = secrets.token_hex(32)


def _itself(port: int) -> str:
    return f"ws://127.0.0.1:{port}"


class Cluster:
    """``count`` services, each on a port of its own; with ``data`` each has a folder, too.

    ``reached`` gives the address at which clients and the other processes are to reach the one on a port.
    """

    def __init__(
        self, folder: Path, count: int, *flags: str, data: bool = False, reached: Callable[[int], str] = _itself
    ) -> None:
        folder.mkdir(exist_ok=True)
        key = folder / "cluster-key"
        key.write_text(f"{_KEY}\n")
        key.chmod(0o600)
        ports = _free_ports(count)
        self.urls = [reached(port) for port in ports]
        peers = [url.replace("ws:", "http:") for url in self.urls]
        self.services: list[Service] = []
        for port, peer in zip(ports, peers, strict=True):
            kept = ("--data", str(folder / str(port))) if data else ()
            own = ("--peers", ",".join(peers), "--advertise", peer, "--cluster-key-file", str(key))
            self.services.append(Service(*own, *kept, *flags, port=port))

    def at(self, port: int) -> Service:
        """The service on a port."""
        return next(service for service in self.services if service.port == port)

    def stop(self) -> None:
        for service in self.services:
            service.stop()


def _free_ports(count: int) -> list[int]:
    """They are taken all at once, so that none is given twice."""
    with ExitStack() as taken:
        listeners = [taken.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]
