"""The programs of examples/python as processes of their own, small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from service import ROOT

FOLDER = ROOT / "examples" / "python"
# The package of this checkout, whatever is installed.
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "clients" / "python" / "src"), "HF_HUB_OFFLINE": "1"}


def start(program: str, *flags: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FOLDER / program), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env={**_ENVIRONMENT, **environment}, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def run(program: str, *flags: object, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with start(program, *flags, cwd=cwd, **environment) as process:
        output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
