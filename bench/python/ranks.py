"""What it costs that every rank sends its own shard: members of one run beside one client that sends everything.

Each member is a process, with its rows of every matrix as FSDP2 cuts them. The parent tells all of them to take a step, and
waits for all: the time is that of the slowest. One client, and the members, take turns. Bytes are those of the TCP
connection, as the kernel counts them (TCP_INFO), and with shared memory those that lie there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import socket
import statistics
import struct
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import muond
import numpy as np

from service import COMMAND, Served, serving
from table import table

WIDTH = 768
MEBIBYTE = 1 << 20
# Longer than any step: a member that does not answer ends the program.
_SECONDS = 300.0


@dataclass(frozen=True)
class Case:
    """``world`` members that send by ``transport``; ``shapes`` are those of the model, in the group of each name."""

    world: int
    transport: str
    shapes: Sequence[tuple[str, str, tuple[int, int]]]
    algorithm: str
    dtype: str
    run: str


def shapes_of(layers: int, vocabulary: int) -> list[tuple[str, str, tuple[int, int]]]:
    """The matrices of GPT-2 of 768, which are Muon's, and its embedding."""
    blocks = [
        (f"h.{i}.{name}", "matrices", shape)
        for i in range(layers)
        for name, shape in {
            "qkv": (3 * WIDTH, WIDTH),
            "out": (WIDTH, WIDTH),
            "up": (4 * WIDTH, WIDTH),
            "down": (WIDTH, 4 * WIDTH),
        }.items()
    ]
    return [*blocks, ("wte", "rest", (vocabulary, WIDTH))]


def rows_of(rank: int, world: int, rows: int) -> tuple[int, int]:
    """As torch cuts a dimension: the last ranks may have fewer rows, or none."""
    each = -(-rows // world)
    return min(rows, rank * each), min(rows, (rank + 1) * each)


class Member:
    """A process with one rank of a run."""

    def __init__(self, case: Case, rank: int, url: str) -> None:
        self._pipe, other = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(other, case, rank, url), daemon=True
        )
        self._process.start()

    def tell(self, what: str) -> None:
        self._pipe.send(what)

    def hear(self) -> Any:
        if not self._pipe.poll(_SECONDS):
            raise RuntimeError(f"a member has not answered within {_SECONDS:.0f} s")
        return self._pipe.recv()

    def end(self) -> None:
        with suppress(OSError):
            self._pipe.send("end")
        self._process.join(10)
        self._process.kill()


def _work(pipe: Connection, case: Case, rank: int, url: str) -> None:
    parameters, gradients = [], []
    for name, group, (rows, columns) in case.shapes:
        start, stop = rows_of(rank, case.world, rows)
        ranges = [(start * columns, stop * columns)] if start < stop else []
        part = _gradient(start * columns, stop * columns)
        gradients.append(part if case.world > 1 else part.reshape(rows, columns))
        parameters.append(
            muond.Parameter(
                name,
                group,
                np.zeros(gradients[-1].shape, np.float32),
                shape=(rows, columns),
                gradient_dtype=case.dtype,
                update_dtype=case.dtype,
                ranges=ranges if case.world > 1 else None,
            )
        )
    hyperparameters = {"muon": {"lr": 0.02}, "adamw": {"lr": 1e-3}, "sgd": {"lr": 0.1, "momentum": 0.9}}
    rest = "adamw" if case.algorithm == "muon" else case.algorithm
    algorithms = {"matrices": case.algorithm, "rest": rest}
    groups = [{"name": name, "algorithm": a, **hyperparameters[a]} for name, a in algorithms.items()]
    run = muond.open_run(
        url,
        run=case.run,
        groups=groups,
        parameters=parameters,
        member=(rank, case.world) if case.world > 1 else None,
        transport=case.transport,
    )
    pipe.send((sum(p.gradient_bytes for p in run.parameters), sum(p.update_bytes for p in run.parameters)))
    while (what := pipe.recv()) != "end":
        if what == "step":
            digest = run.step(gradients).digest
            usage = resource.getrusage(resource.RUSAGE_SELF)
            pipe.send((digest, usage.ru_utime + usage.ru_stime, _socket_bytes()))
    run.close()


def _gradient(start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Elements of a gradient that look random: Knuth's multiplicative hash of their places, from -0.5 to 0.5."""
    hashed = np.arange(start, stop, dtype=np.uint32) * np.uint32(2_654_435_761)
    return (hashed >> np.uint32(12)).astype(np.float32) * np.float32(2**-20) - np.float32(0.5)


def _socket_bytes() -> tuple[int, int]:
    """Bytes that the connections of this process have sent (and the peer has acknowledged) and received."""
    sent = received = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    # struct tcp_info of linux/tcp.h: tcpi_bytes_acked and tcpi_bytes_received are at 120 and 128.
                    acked, came = struct.unpack_from(
                        "<QQ", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 120
                    )
                    sent, received = sent + acked, received + came
        except OSError:
            continue
    return sent, received


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


class Crew:
    """All members of one case, and what their steps took."""

    def __init__(self, case: Case, service: Served) -> None:
        self.case = case
        self._service = service
        self.members = []
        for rank in range(case.world):
            self.members.append(Member(case, rank, service.url))
            sizes = self.members[-1].hear()
            self.sizes = sizes if rank == 0 else tuple(max(a, b) for a, b in zip(self.sizes, sizes, strict=True))
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.digests: list[str] = []
        self.wire: list[tuple[float, float]] = []
        self._before: list[tuple[str, float, tuple[int, int]]] = []

    def step(self) -> None:
        cpu, start = _cpu_seconds(self._service.pid), time.perf_counter()
        for member in self.members:
            member.tell("step")
        told = [member.hear() for member in self.members]
        wall = time.perf_counter() - start
        if self._before:
            clients = sum(now[1] - then[1] for now, then in zip(told, self._before, strict=True))
            self.walls.append(wall)
            self.cpus.append(clients + _cpu_seconds(self._service.pid) - cpu)
            moved = [
                [n - t for n, t in zip(now[2], then[2], strict=True)]
                for now, then in zip(told, self._before, strict=True)
            ]
            self.wire.append((max(m[0] for m in moved), max(m[1] for m in moved)))
        self._before = told
        digests = {digest for digest, _, _ in told}
        assert len(digests) == 1, "all members have one receipt"
        self.digests += digests

    def end(self) -> None:
        for member in self.members:
            member.end()


def main() -> None:
    options = _options()
    shapes = [(f"w{i}", "matrices", (4096, 4096)) for i in range(options.gibibytes * 16)]
    shapes = shapes or shapes_of(options.layers, options.vocabulary)
    size = sum(rows * columns for _, _, (rows, columns) in shapes) * (2 if options.dtype == "bfloat16" else 4)
    said = f"{len(shapes)} parameters of {size / MEBIBYTE:.0f} MiB as {options.dtype}, {options.algorithm}"
    print(f"{said}; load {os.getloadavg()[0]:.1f}", flush=True)
    cases = [
        Case(world, transport, shapes, options.algorithm, options.dtype, f"ranks-{transport}-{world}")
        for transport in options.transports.split(",")
        for world in (1, *[int(n) for n in options.members.split(",")])
    ]
    # What has one service has its turns; apart each has a service, and memory, of its own.
    together = [[case] for case in cases] if options.apart else [cases]
    crews = [crew for those in together for crew in _measured(those, size, options)]
    print(_report(crews, size))
    same = len({tuple(crew.digests) for crew in crews}) == 1
    print(f"digests of all steps equal for all: {same}; load {os.getloadavg()[0]:.1f}")
    if not same:
        raise SystemExit(1)


def _measured(cases: Sequence[Case], size: int, options: argparse.Namespace) -> list[Crew]:
    with serving(options.service_command, 60.0) as service:
        before = _resident(service.pid)
        crews = [Crew(case, service) for case in cases]
        try:
            for _ in range(options.steps + 1):
                for crew in crews:
                    crew.step()
            grown = _resident(service.pid) - before
            state = sum(_state_bytes(service, case.run) for case in cases)
        finally:
            for crew in crews:
                crew.end()
    # Members' gradients come together in memory that was admitted when the run was opened, and so do their updates.
    admitted = state + sum(2 * size for case in cases if case.world > 1)
    names = ", ".join(f"{case.world} by {case.transport}" for case in cases)
    print(
        f"{names}: {grown / MEBIBYTE:.0f} MiB more resident; state, members' tensors: {admitted / MEBIBYTE:.0f} MiB",
        flush=True,
    )
    return crews


def _state_bytes(service: Served, run: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{service.url.replace('ws', 'http', 1)}/v1/runs/{run}", timeout=30) as answer:
        return int(json.load(answer)["state_bytes"])


def _report(crews: Sequence[Crew], size: int) -> str:
    rows = []
    for crew in crews:
        one = next(c for c in crews if c.case.world == 1 and c.case.transport == crew.case.transport)
        shared = crew.case.transport == "shm"
        sent, received = crew.sizes if shared else (statistics.median(w[i] for w in crew.wire) for i in (0, 1))
        part = size / crew.case.world
        rows.append(
            [
                crew.case.transport,
                str(crew.case.world),
                f"{sent / MEBIBYTE:.2f} ({100 * (sent / part - 1):+.1f} %)",
                f"{received / MEBIBYTE:.2f} ({100 * (received / part - 1):+.1f} %)",
                f"{min(crew.walls):.3f} s",
                f"{statistics.median(crew.walls):.3f} s",
                f"{min(crew.walls) / min(one.walls):.2f}",
                f"{statistics.median(crew.walls) / statistics.median(one.walls):.2f}",
                f"{statistics.median(crew.cpus):.2f} s",
            ]
        )
    head = ["transport", "members", "MiB sent by a rank", "MiB received", "step", "median", "over one", "median", "CPU"]
    return table(head, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--members", default="2,4", help="numbers of members, beside one client (default %(default)s)")
    add("--transports", default="shm,websocket", help="default %(default)s")
    add("--layers", type=int, default=12, help="of GPT-2 (default %(default)s)")
    add("--vocabulary", type=int, default=50_304, help="rows of the embedding (default %(default)s)")
    add("--gibibytes", type=int, default=0, help="instead of GPT-2: so many GiB of float32 matrices of 4096 x 4096")
    add("--apart", action="store_true", help="one after the other, each with a service of its own: for large models")
    add("--algorithm", choices=("muon", "adamw", "sgd"), default="muon", help="of the matrices (default %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default %(default)s")
    add("--steps", type=int, default=5, help="after one that is not measured (default %(default)s)")
    add("--service-command", default=COMMAND, help="default %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
