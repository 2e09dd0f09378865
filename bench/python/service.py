"""Runs a muond service for as long as a measurement takes, by a command of the caller's. Every wait has a limit."""

from __future__ import annotations

import ctypes
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = f"node {shlex.quote(str(ROOT / 'dist' / 'src' / 'server.js'))}"

_PR_SET_PDEATHSIG = 1
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Served:
    """A service that is ready. ``device`` is the device that it computes on, by the service's name for it."""

    url: str
    device: str
    command: str
    pid: int


@contextmanager
def serving(command: str, seconds: float, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Starts the service, on a free port unless the command has one. Raises RuntimeError if it is not ready in time."""
    words = shlex.split(command)
    if "--port" not in words:
        words += ["--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=end_with_parent)
    try:
        assert process.stdout is not None
        lines: Queue[str | None] = Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        deadline = time.monotonic() + seconds
        listening = _listening(process, lines, deadline, " ".join(words))
        address = str(listening["address"])
        _wait_until_ready(address, deadline)
        yield Served(address.replace("http", "ws", 1), str(listening["device"]), " ".join(words), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_SECONDS)


def _read(log: IO[str], lines: Queue[str | None]) -> None:
    # To its end, so that the service never waits for a full pipe.
    for line in log:
        lines.put(line)
    lines.put(None)


def _listening(
    process: subprocess.Popen[str], lines: Queue[str | None], deadline: float, command: str
) -> dict[str, Any]:
    heard: list[str] = []
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise RuntimeError(f"`{command}` was not listening in time; it said:\n{''.join(heard)}") from None
        if line is None:
            raise RuntimeError(f"`{command}` ended with {process.wait(1)}; it said:\n{''.join(heard)}")
        heard.append(line)
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "listening":
            return dict(event)


def _wait_until_ready(address: str, deadline: float) -> None:
    # Proxies of the environment are not for loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    last: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with opener.open(f"{address}/readyz", timeout=min(left, 5.0)):
                return
        except OSError as error:
            last = error
            time.sleep(0.05)
    raise RuntimeError(f"{address}/readyz did not answer in time: {last}")


def end_with_parent() -> None:
    """On Linux the kernel ends the service when this process ends, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
