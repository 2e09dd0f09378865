"""A muond service for as long as an example runs: the one at --url, or one of its own, started from this checkout."""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "dist" / "src" / "server.js"

_PR_SET_PDEATHSIG = 1


@contextmanager
def serving(url: str | None, data: Path | None = None) -> Iterator[str]:
    """The address of a service, which ends with the block if it was started here; ``data`` is where it keeps its runs.

    Raises SystemExit with one line if it cannot be started.
    """
    if url is not None:
        yield url
        return
    node = _find("node", "install Node.js 20 or later, or give the --url of a service that runs")
    if not SERVER.exists():
        _build()
    keeping = [] if data is None else ["--data", str(data)]
    command = [node, str(SERVER), "--port", "0", "--log-level", "info", *keeping]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_ending_with_parent())
    try:
        assert process.stdout is not None
        yield _address(process.stdout)
    finally:
        process.terminate()
        process.wait()


def _find(program: str, advice: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise SystemExit(f"{program} was not found: {advice}")
    return found


def _build() -> None:
    npm = _find("npm", f"it builds the service, because {SERVER} does not exist")
    if not (ROOT / "node_modules").exists():
        raise SystemExit(f"{ROOT / 'node_modules'} does not exist: run `npm ci` in {ROOT} first")
    print("building the service (npm run build)", file=sys.stderr)
    done = subprocess.run([npm, "run", "build"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"`npm run build` ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _address(log: IO[str]) -> str:
    """The address in the first log line that has one. Later lines are read too, so that the pipe never fills."""
    for line in log:
        address = json.loads(line).get("address")
        if address is not None:
            threading.Thread(target=lambda: log.read(), daemon=True).start()
            return str(address)
    raise SystemExit("the service ended before it was ready; what it had to say is above")


def _ending_with_parent() -> Callable[[], None] | None:
    """On Linux the kernel ends the service when this process is killed, which then cannot do it itself."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
