"""The client against bare sockets and the `websockets` package: the same bytes, the same machine, turn by turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from table import table
from workload import Mode

CPU_SECONDS_PER_GIGABYTE = 0.20
OVER_RAW = 1.3

_HERE = Path(__file__).parent
# The kind of peer that each client needs; the others are compared with the first one.
_CLIENTS = {"raw": "raw", "muond": "service", "websockets": "messages"}
_SECONDS = 120.0


@dataclass(frozen=True)
class Measurement:
    """One client process: what it moved, how long it took, and the CPU seconds of the whole process meanwhile."""

    client: str
    mode: Mode
    bytes: int
    seconds: float
    user_seconds: float
    system_seconds: float

    @property
    def cpu(self) -> float:
        """CPU seconds for each GB."""
        return (self.user_seconds + self.system_seconds) / self.bytes * 1e9

    @property
    def speed(self) -> float:
        """GB/s, both directions together."""
        return self.bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Row:
    """All measurements of one client in one mode. CPU seconds are per GB; the least ones met the least other work."""

    mode: Mode
    client: str
    cpu_least: float
    cpu_median: float
    cpu_most: float
    user: float
    system: float
    cpu_over_raw: float
    speed_most: float
    speed_median: float


def measure(rounds: int, congestion: str, progress: Callable[[str], None]) -> list[Row]:
    """Every client in every mode, once in each round."""
    found: list[Measurement] = []
    modes: tuple[Mode, ...] = get_args(Mode)
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        for mode in modes:
            found += [_once(client, mode, congestion) for client in _CLIENTS]
    return [_row(client, mode, found) for mode in modes for client in _CLIENTS]


def _once(client: str, mode: Mode, congestion: str) -> Measurement:
    peer = subprocess.Popen(
        [sys.executable, str(_HERE / "peer.py"), _CLIENTS[client], mode, congestion], stdout=subprocess.PIPE, text=True
    )
    try:
        assert peer.stdout is not None
        port = peer.stdout.readline().strip()
        done = subprocess.run(
            [sys.executable, str(_HERE / "client.py"), client, mode, port],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
        return Measurement(client, mode, **json.loads(done.stdout))
    finally:
        peer.kill()
        peer.wait()


def _row(client: str, mode: Mode, found: list[Measurement]) -> Row:
    own = [m for m in found if (m.client, m.mode) == (client, mode)]
    raw = [m for m in found if (m.client, m.mode) == ("raw", mode)]
    least = min(own, key=lambda m: m.cpu)
    return Row(
        mode=mode,
        client=client,
        cpu_least=least.cpu,
        cpu_median=statistics.median(m.cpu for m in own),
        cpu_most=max(m.cpu for m in own),
        user=least.user_seconds / least.bytes * 1e9,
        system=least.system_seconds / least.bytes * 1e9,
        cpu_over_raw=least.cpu / min(m.cpu for m in raw),
        speed_most=max(m.speed for m in own),
        speed_median=statistics.median(m.speed for m in own),
    )


def bounds(rows: list[Row]) -> list[dict[str, Any]]:
    """The bounds of each direction, which were stated before anything was measured."""
    ours = [row for row in rows if row.client == "muond" and row.mode != "both"]
    stated = [(f"CPU s/GB, {row.mode}", row.cpu_least, CPU_SECONDS_PER_GIGABYTE) for row in ours]
    stated += [(f"CPU over raw, {row.mode}", row.cpu_over_raw, OVER_RAW) for row in ours]
    return [{"what": what, "value": value, "bound": bound, "holds": value <= bound} for what, value, bound in stated]


def render(rows: list[Row]) -> str:
    head = ("direction", "client", "CPU s/GB", "median", "most", "user", "system", "over raw", "GB/s", "median")
    cells = [
        (
            *(row.mode, row.client, f"{row.cpu_least:.3f}", f"{row.cpu_median:.3f}", f"{row.cpu_most:.3f}"),
            *(f"{row.user:.3f}", f"{row.system:.3f}", f"{row.cpu_over_raw:.2f}"),
            *(f"{row.speed_most:.2f}", f"{row.speed_median:.2f}"),
        )
        for row in rows
    ]
    checked = [
        (b["what"], f"{b['value']:.3f}", f"<= {b['bound']:.2f}", "pass" if b["holds"] else "FAIL") for b in bounds(rows)
    ]
    return f"{table(head, cells)}\n\n{table(('bound', 'measured', 'asked', ''), checked)}"


def as_json(rows: list[Row]) -> dict[str, Any]:
    return {"rows": [asdict(row) for row in rows], "bounds": bounds(rows)}
