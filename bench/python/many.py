"""What many small tensors cost: a mixture of experts has thousands, and the same elements in few tensors are the measure.

Both have the same matrices, so that Muon computes the same products for both: 64x64 each a parameter of its own, or 192 of
them side by side in one parameter (the layout `batch`). Each is measured with a service of its own.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from muond.torch import Optimizer

from service import COMMAND, serving
from table import table

_SIDE = 64
_TOGETHER = 192
# How long the service has to be ready.
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Taken:
    """Seconds on the clock, and of the processors by this process and by the service."""

    wall: float
    client: float
    service: float


@dataclass
class Figures:
    """``steps`` without the first one, which allocates; ``state_bytes`` is what a state_dict has."""

    algorithm: str
    tensors: int
    open: float = 0.0
    steps: list[Taken] = field(default_factory=list)
    state_dict: float = 0.0
    load: float = 0.0
    state_bytes: int = 0

    @property
    def step(self) -> Taken:
        """The fastest one met the fewest neighbours on a machine that is shared."""
        return min(self.steps, key=lambda taken: taken.wall)


def measure(algorithm: str, count: int, together: int, steps: int, url: str) -> Figures:
    """``count`` matrices, ``together`` in each parameter, with an optimizer in the service at ``url``."""
    shape = (together, _SIDE, _SIDE) if together > 1 else (_SIDE, _SIDE)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count // together)]
    for parameter in parameters:
        parameter.grad = torch.randn(shape, generator=generator)
    layout = {"matrices": "batch"} if together > 1 and algorithm == "muon" else {}
    momentum = {"momentum": 0.9} if algorithm == "sgd" else {}
    named = [(f"experts.{number}.weight", parameter) for number, parameter in enumerate(parameters)]
    optimizer = Optimizer([{"params": named, "algorithm": algorithm, "lr": 1e-3, **layout, **momentum}], url=url)
    figures = Figures(algorithm, len(parameters))
    try:
        figures.open = _seconds(optimizer.open)
        optimizer.step()
        figures.steps = [_taken(optimizer.step, url) for _ in range(steps)]
        figures.state_dict = min(_seconds(optimizer.state_dict) for _ in range(2))
        saved = optimizer.state_dict()
        figures.state_bytes = sum(t.nbytes for entries in saved["state"].values() for t in entries.values())
        optimizer.step()
        figures.load = _seconds(lambda: optimizer.load_state_dict(saved))
    finally:
        optimizer.close(delete=True)
    return figures


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _taken(call: Callable[[], object], url: str) -> Taken:
    client, service = _client_cpu(), _service_cpu(url)
    wall = _seconds(call)
    return Taken(wall, _client_cpu() - client, _service_cpu(url) - service)


def _client_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _service_cpu(url: str) -> float:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url.replace('ws', 'http', 1)}/metrics", timeout=30) as answer:
        found = re.search(r"^\w*process_cpu_seconds_total ([\d.e+-]+)", answer.read().decode(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{url} has no process_cpu_seconds_total among its metrics")
    return float(found[1])


def _row(figures: Figures, few: Figures | None) -> Sequence[str]:
    step, rate = figures.step, figures.state_bytes / 1e9
    return (
        figures.algorithm,
        f"{figures.tensors:,}",
        f"{figures.open:.2f} s",
        f"{step.wall:.2f} s",
        f"{statistics.median(taken.wall for taken in figures.steps):.2f} s",
        "" if few is None else f"{step.wall / few.step.wall:.2f}",
        f"{step.client:.2f} s",
        f"{step.service:.2f} s",
        f"{rate / figures.state_dict:.2f} GB/s",
        f"{rate / figures.load:.2f} GB/s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=18432, help=f"a multiple of {_TOGETHER} (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps that count (default %(default)s)")
    parser.add_argument("--algorithms", default="sgd,adamw,muon", help="default %(default)s")
    parser.add_argument("--service-command", default=f"{COMMAND} --device cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    rows: list[Sequence[str]] = []
    for algorithm in arguments.algorithms.split(","):
        few: Figures | None = None
        for together in (_TOGETHER, 1):
            with serving(arguments.service_command, _START_SECONDS) as served:
                figures = measure(algorithm, arguments.matrices, together, arguments.steps, served.url)
            rows.append(_row(figures, few))
            few = few or figures
    head = ("algorithm", "tensors", "open", "step", "median", "over few", "client CPU", "service CPU")
    print(table((*head, "state_dict", "load_state_dict"), rows))


if __name__ == "__main__":
    main()
