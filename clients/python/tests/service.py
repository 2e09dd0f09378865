"""A service in a process of its own, and a proxy that cuts connections in front of it."""

from __future__ import annotations

import hashlib
import json
import resource
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SERVER = ROOT / "dist" / "src" / "server.js"


def keys_file(folder: Path, scopes: dict[str, list[str]]) -> str:
    """Writes a file of keys with their scopes, for ``--keys-file``, and returns its path."""
    keys = [
        {"name": f"key-{i}", "sha256": hashlib.sha256(key.encode()).hexdigest(), "scopes": scopes[key]}
        for i, key in enumerate(scopes)
    ]
    path = folder / "keys.yaml"
    path.write_text(json.dumps({"keys": keys}))
    return str(path)


@cache
def build() -> None:
    """Compiles the service if a source is newer than what was compiled."""
    sources = [path for folder in ("src", "kernels") for path in (ROOT / folder).rglob("*.ts")]
    newest = max(path.stat().st_mtime for path in sources)
    if not SERVER.exists() or SERVER.stat().st_mtime < newest:
        subprocess.run(["npm", "run", "build"], cwd=ROOT, check=True, capture_output=True)


class Service:
    """`node dist/src/server.js` on the CPU with one lane. Its log is read, so that it never waits for a full pipe."""

    def __init__(self, *flags: str, port: int = 0) -> None:
        self._flags = flags
        fixed = ("--device", "cpu", "--lanes", "1", "--threads", "1", "--port", str(port))
        self.process = subprocess.Popen(["node", str(SERVER), *fixed, *flags], stdout=subprocess.PIPE, text=True)
        self.events: list[dict[str, object]] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        listening = self.event("listening")
        self.port = int(str(listening["address"]).rsplit(":", 1)[1])
        self.url = f"ws://127.0.0.1:{self.port}"

    def event(self, name: str, holds: Callable[[dict[str, object]], bool] = lambda _: True) -> dict[str, object]:
        """Waits for a line of the log and returns it."""
        with self._changed:
            found = lambda: next((e for e in self.events if e.get("event") == name and holds(e)), None)  # noqa: E731
            assert self._changed.wait_for(lambda: found() is not None or self.process.poll() is not None, 60), name
            event = found()
            assert event is not None, f"the service ended with {self.process.poll()} before '{name}'"
            return event

    def kill(self) -> None:
        """As a machine that loses power: no draining, no close frames."""
        self.process.kill()
        self._ended()

    def restart(self) -> None:
        """The same service on the same port, with whatever it has on the disk."""
        self.__init__(*self._flags, port=self.port)  # type: ignore[misc]

    def kill_and_restart(self) -> None:
        self.kill()
        self.restart()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._ended()

    def _ended(self) -> None:
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError):
                event = json.loads(line)
                with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def limit_file_size(service: Service, size: int) -> None:
    """What a full disk is to the service: no file of it grows beyond so many bytes; -1 is as many as it likes."""
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def damage(data: Path, run: str, checkpoint: str) -> None:
    """Turns one bit of the tensors of a checkpoint."""
    [file] = (data / "runs" / run / "checkpoints" / checkpoint).glob("*.safetensors")
    body = bytearray(file.read_bytes())
    body[-1] ^= 1
    file.write_bytes(body)


class Proxy:
    """Cuts its n-th connection dead after `budgets[n]` bytes, counted over both directions; those beyond the list live on.

    `spent` is called when a budget is used up, before the connection is cut.
    """

    def __init__(self, port: int, budgets: Sequence[int] = (), spent: Callable[[], None] = lambda: None) -> None:
        self._target = port
        self._spent = spent
        self._budgets = budgets
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.connections = 0
        self.relayed = 0
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for pair in self._pairs:
            _destroy(pair)

    def close(self) -> None:
        _destroy((self._listener,))
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            budget = self._budgets[self.connections] if self.connections < len(self._budgets) else 1 << 62
            self.connections += 1
            try:
                service = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._pairs.append((client, service))
            left = [budget]
            lock = threading.Lock()
            for source, target in ((client, service), (service, client)):
                threading.Thread(target=self._relay, args=(source, target, left, lock), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, left: list[int], lock: threading.Lock) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with lock:
                    before = left[0]
                    count = max(0, min(len(data), before))
                    left[0] -= len(data)
                    self.relayed += count
                target.sendall(data[:count])
                if left[0] <= 0:
                    if before > 0:
                        self._spent()
                    break
        _destroy((source, target))


def _destroy(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
