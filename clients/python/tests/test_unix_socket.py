"""A service that listens on a Unix socket: streams, shared memory and REST over it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from muond import MuondError, Parameter, open_run
from muond.rest import Rest
from muond.transport.address import endpoint
from service import SERVER, Service

GROUPS = [{"name": "g", "algorithm": "adamw", "lr": 0.01}]


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket: its path has at most 108 bytes, and pytest's folders have long names."""
    with tempfile.TemporaryDirectory(prefix="muond-") as folder:
        yield Path(folder) / "m.sock"


def digest(url: str, run: str, transport: str) -> str:
    weights = np.ones((24, 40), np.float32)
    parameters = [Parameter("w", "g", weights)]
    with open_run(url, run=run, groups=GROUPS, parameters=parameters, transport=transport) as one:
        one.step({"w": weights.copy()})
        assert one.transport == ("shm" if transport == "auto" else "websocket")
        return one.step({"w": weights.copy()}).digest


def test_a_run_trains_over_a_unix_socket(start: Callable[..., Service], path: Path) -> None:
    service = start("--socket", str(path))
    assert os.stat(path).st_mode & 0o777 == 0o600
    url = f"ws+unix://{path}"
    expected = digest(service.url, "tcp", "websocket")
    assert digest(url, "unix", "websocket") == expected
    assert digest(url, "shared", "auto") == expected
    with Rest(endpoint(url)) as rest:
        assert rest.run("unix")["step"] == 2
    service.stop()
    assert not path.exists()


def test_a_socket_that_is_not_there_is_a_lost_connection(path: Path) -> None:
    with pytest.raises(MuondError, match="is muond running there") as caught:
        open_run(f"ws+unix://{path}", run="r", groups=GROUPS, parameters=[], retries=0)
    assert (caught.value.code, caught.value.retryable) == ("CONNECTION_LOST", True)


def test_two_services_do_not_share_a_socket(start: Callable[..., Service], path: Path) -> None:
    first = start("--socket", str(path))
    command = ["node", str(SERVER), "--device", "cpu", "--port", "0", "--socket", str(path)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert second.stderr == f"muond: socket '{path}' is in use: another service listens there\n"
    first.kill()
    assert path.exists(), "a killed service leaves it"
    third = start("--socket", str(path))
    assert digest(f"ws+unix://{path}", "r", "auto")
    third.stop()
