"""What a step costs a trainer on the service's own host, by transport: shared GPU memory, shared host memory, the socket.

    PYTHONPATH=clients/python/src python3 bench/python/samehost.py --service-command "node dist/src/server.js --device cuda"
    PYTHONPATH=clients/python/src python3 bench/python/samehost.py --device cpu

Needs torch and numpy, and a built service. Everything is measured by the client: a step has ended when its updates are
applied and the GPU is idle. On a GPU torch.optim takes turns with muond in one process. On a CPU GPT-2 124M's tensors
are stepped under sgd, and the CPU seconds of both processes are beside those of memcpy of the same bytes. Prints
tables, with --out also JSON; ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import itertools
import json
import os
import platform
import pstats
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muond.error import MuondError
from muond.torch import Muon, Optimizer, suggest

from checks import Checks
from gpt import gpt
from service import COMMAND, Served, serving

SHAPES = {
    "GPT-2 124M": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    "Llama-1B": [(2048, 2048), (2048, 2048), (512, 2048), (512, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * 16,
}
ASKED = {"GPT-2 124M": 0.25, "Llama-1B": 0.60}


def main() -> int:
    options = _options()
    checks = Checks(options.seconds)
    device = torch.device(options.device)
    with serving(options.service_command, 60, dict(os.environ)) as service:
        machine = _machine(device, service)
        print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n", flush=True)
        if device.type == "cuda":
            for name in SHAPES:
                checks.part(f"matrices of {name}", lambda name=name: _matrices(checks, service, name, options))
            checks.part("same bits", lambda: _same_bits(checks, service, device))
            checks.part("whole model", lambda: _whole_model(checks, service, device, options))
            checks.part("killed client", lambda: _killed_client(checks, service))
        else:
            checks.part("host memory", lambda: _host(checks, service, options))
    if device.type == "cuda":
        checks.part("journal", lambda: _journal(checks, options, device))
        checks.part("killed service", lambda: _killed_service(checks, options, device))
    print(checks.render())
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine, **checks.json()}, indent=2) + "\n")
    return 0 if checks.hold else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service-command", default=COMMAND, help="starts the service; a --port is added")
    parser.add_argument("--device", default="cuda", help="where the model is")
    parser.add_argument("--steps", type=int, default=15, help="that count, after three that do not")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all of it")
    parser.add_argument("--profile", action="store_true", help="also where the client's time goes")
    parser.add_argument("--scratch", default="/tmp", help="folder for the journal of one check")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    return parser.parse_args()


def _machine(device: torch.device, service: Served) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "trainer": name,
        "torch": torch.__version__,
        "service": service.device,
        "command": service.command,
        "cores": str(os.cpu_count()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _timed(device: torch.device, act: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _in_turn(device: torch.device, steps: int, acts: Sequence[Callable[[], object]]) -> list[float]:
    """The median seconds of each, all of them once in every round; the first three rounds do not count."""
    rounds = [[_timed(device, act) for act in acts] for _ in range(steps + 3)]
    return [statistics.median(column) for column in zip(*rounds[3:], strict=True)]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _parameters(
    shapes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _matrices(checks: Checks, service: Served, name: str, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    ours, theirs = (_parameters(SHAPES[name], device, torch.bfloat16) for _ in range(2))
    local = torch.optim.Muon(theirs, lr=1e-3)
    with Muon(ours, lr=1e-3, url=service.url, transport="cuda-ipc") as optimizer:
        local_seconds, seconds = _in_turn(device, options.steps, [local.step, optimizer.step])
        if options.profile:
            _profile(name, device, optimizer)
        ratio = seconds / local_seconds
        checks.note(f"{name} matrices, torch.optim.Muon", _ms(local_seconds))
        asked = ASKED[name]
        checks.add(f"{name} matrices, cuda-ipc", f"{_ms(seconds)}, ratio {ratio:.3f}", f"<= {asked}", ratio <= asked)
        phases = optimizer.receipt.seconds if optimizer.receipt is not None else {}
        checks.note(f"{name} matrices, the last receipt", ", ".join(f"{k} {_ms(v)}" for k, v in phases.items()))
        optimizer.close(delete=True)
    del ours, theirs, local, optimizer
    gc.collect()
    torch.cuda.empty_cache()


def _profile(name: str, device: torch.device, optimizer: Optimizer) -> None:
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(20):
        _timed(device, optimizer.step)
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(18)
    print(f"profile of 20 steps, {name}", text.getvalue()[:3500], file=sys.stderr, flush=True)


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    return suggest(model, muon={"lr": 1e-4}, adamw={"lr": 1e-4}, quiet=True)


def _local(model: torch.nn.Module) -> Callable[[], None]:
    hidden, rest = ([parameter for _, parameter in group["params"]] for group in _groups(model))
    muon, adamw = torch.optim.Muon(hidden, lr=1e-4), torch.optim.AdamW(rest, lr=1e-4)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def _whole_model(checks: Checks, service: Served, device: torch.device, options: argparse.Namespace) -> None:
    """GPT-2 124M in float32, its forward pass in bfloat16, 4 x 512 tokens."""
    batch = torch.randint(50257, (4, 513), generator=torch.Generator().manual_seed(1)).to(device)
    local = _Trainer(device, batch, _local)
    for transport in ("cuda-ipc", "shm", "websocket"):
        _by_transport(checks, service, local, transport, options)
        gc.collect()
        torch.cuda.empty_cache()


class _Trainer:
    """A model of its own, and what steps it."""

    def __init__(self, device: torch.device, batch: torch.Tensor, make: Callable[[torch.nn.Module], Callable[[], Any]]):
        self.device = device
        self.batch = batch
        self.model = gpt(device)
        self.step = make(self.model)

    def backward(self) -> None:
        self.model.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model.loss(self.batch)
        loss.backward()  # type: ignore[no-untyped-call]

    def whole(self) -> None:
        self.backward()
        self.step()

    def step_seconds(self) -> float:
        self.backward()
        return _timed(self.device, self.step)


def _by_transport(
    checks: Checks, service: Served, local: _Trainer, transport: str, options: argparse.Namespace
) -> None:
    asked = {"cuda-ipc": 10.0, "shm": 20.0}
    device = local.device
    before = torch.cuda.mem_get_info(device)[0]
    made: list[Optimizer] = []

    def serve(model: torch.nn.Module) -> Callable[[], object]:
        made.append(Optimizer(model.named_parameters(), _groups(model), url=service.url, transport=transport))  # type: ignore[arg-type]
        return made[0].step

    ours = _Trainer(device, local.batch, serve)
    local_whole, our_whole = _in_turn(device, options.steps, [local.whole, ours.whole])
    steps = [(local.step_seconds(), ours.step_seconds()) for _ in range(options.steps)]
    local_seconds, seconds = (statistics.median(column) for column in zip(*steps, strict=True))
    used = (before - torch.cuda.mem_get_info(device)[0]) / 2**20
    bound = asked.get(transport)
    checks.add(
        f"GPT-2 124M whole model, step(), {transport}",
        f"{_ms(seconds)} (torch.optim {_ms(local_seconds)})",
        "" if bound is None else f"<= {bound:.0f} ms",
        None if bound is None else seconds <= bound / 1e3,
    )
    ratio = our_whole / local_whole
    checks.add(
        f"GPT-2 124M whole training step, {transport}",
        f"{_ms(our_whole)} (torch.optim {_ms(local_whole)}), ratio {ratio:.3f}",
        "<= 1.0" if transport == "cuda-ipc" else "",
        ratio <= 1.0 if transport == "cuda-ipc" else None,
    )
    checks.note(f"GPU memory taken, model and gradients included, {transport}", f"{used:.0f} MiB")
    if options.profile and transport != "websocket":
        _profile(f"whole model, {transport}", device, made[0])
    made[0].close(delete=True)


def _trained(url: str, device: torch.device, transport: str, steps: int = 5) -> tuple[list[str], list[torch.Tensor]]:
    """Digests and weights of a small model whose gradients are the same for every transport."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 256), torch.nn.LayerNorm(256), torch.nn.Linear(256, 40)).to(device)
    digests: list[str] = []
    with Optimizer(model.named_parameters(), _groups(model), url=url, transport=transport) as optimizer:
        for step in range(steps):
            generator = torch.Generator(device).manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, device=device, generator=generator)
            optimizer.step()
            digests.append(optimizer.run.digest)
        assert optimizer.run.transport == transport, optimizer.run.transport
        optimizer.close(delete=True)
    return digests, [parameter.detach().clone() for parameter in model.parameters()]


def _same_bits(checks: Checks, service: Served, device: torch.device, what: str = "without a journal") -> None:
    trained = {transport: _trained(service.url, device, transport) for transport in ("cuda-ipc", "shm", "websocket")}
    digests, weights = trained["websocket"]
    for transport in ("cuda-ipc", "shm"):
        ours, values = trained[transport]
        equal = ours == digests and all(torch.equal(a, b) for a, b in zip(values, weights, strict=True))
        said = "digests and weights equal" if equal else f"differ: {ours} and {digests}"
        checks.add(f"bits of {transport} beside the socket's, {what}", said, "equal", equal)


def _journal(checks: Checks, options: argparse.Namespace, device: torch.device) -> None:
    folder = Path(options.scratch) / f"muond-journal-{os.getpid()}"
    command = f"{options.service_command} --data {folder} --durability journal"
    with serving(command, 60, dict(os.environ)) as service:
        _same_bits(checks, service, device, "with a journal")


_CLIENT = """
import sys, torch
from muond.torch import Muon
parameters = [torch.nn.Parameter(torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)) for _ in range(48)]
optimizer = Muon(parameters, lr=1e-3, url=sys.argv[1], transport="cuda-ipc", overlap=True)
for parameter in parameters:
    parameter.grad = torch.randn_like(parameter)
optimizer.step()
print("stepped", flush=True)
while True:
    optimizer.step()
"""


def _killed_client(checks: Checks, service: Served) -> None:
    """A client that is killed with jobs under way: others go on, and its memory comes back."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    device = torch.device("cuda")
    _trained(service.url, device, "cuda-ipc", 2)
    free: list[int] = []
    for _ in range(4):
        command = [sys.executable, "-c", _CLIENT, service.url]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert client.stdout is not None
        if client.stdout.readline().strip() != "stepped":
            raise RuntimeError("the client did not step")
        client.send_signal(signal.SIGKILL)
        client.wait()
        _trained(service.url, device, "cuda-ipc", 2)
        free.append(torch.cuda.mem_get_info(device)[0])
    # Runs of killed clients keep their state; each has 48 x 16 MiB, and arenas of 2 x 48 x 8 MiB would be on top.
    growth = [(a - b) / 2**20 for a, b in itertools.pairwise(free)]
    said = f"others go on; free memory fell by {', '.join(f'{g:.0f}' for g in growth)} MiB a kill"
    checks.add("4 clients killed -9 while they step", said, "<= 768 MiB of state each", max(growth) <= 800)


def _killed_service(checks: Checks, options: argparse.Namespace, device: torch.device) -> None:
    """A service that is killed with clients mapped: the client is told, and its own memory is good."""
    parameters = _parameters([(512, 512)] * 8, device, torch.bfloat16)
    with serving(options.service_command, 60, dict(os.environ)) as service:
        optimizer = Muon(parameters, lr=1e-3, url=service.url, transport="cuda-ipc", retries=0)
        optimizer.step()
        pids = subprocess.run(["pgrep", "-f", service.command], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():
            if int(pid) != os.getpid():
                os.kill(int(pid), signal.SIGKILL)
        try:
            optimizer.step()
            said = "no error"
        except MuondError as error:
            said = error.code
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    optimizer.close()
    torch.cuda.synchronize()
    checks.add(
        "a service killed -9 while its client is mapped", said, "CONNECTION_LOST", said == "CONNECTION_LOST" and finite
    )


# Host memory


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _host(checks: Checks, service: Served, options: argparse.Namespace) -> None:
    """GPT-2 124M's tensors under sgd, in float32: next to no computing, all of it transport."""
    with torch.no_grad():
        parameters = [torch.nn.Parameter(parameter.clone()) for parameter in gpt(torch.device("cpu")).parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    size = 2 * 4 * sum(parameter.numel() for parameter in parameters)
    pid = int(
        subprocess.run(["pgrep", "-f", service.command], capture_output=True, text=True, check=True).stdout.split()[0]
    )
    groups = [{"params": parameters, "algorithm": "sgd", "lr": 1e-6}]
    rows: dict[str, list[tuple[float, float, float]]] = {"shm": [], "websocket": [], "memcpy": []}
    one, two = np.ones(size // 2, np.uint8), np.ones(size // 2, np.uint8)
    optimizers = {
        transport: Optimizer(
            groups, url=service.url, transport=transport, gradient_dtype="float32", update_dtype="float32"
        )
        for transport in ("shm", "websocket")
    }
    acts: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in optimizers.items()}
    acts["memcpy"] = lambda: (np.copyto(one, two), np.copyto(two, one))
    for step in range(options.steps + 3):
        for name, act in acts.items():
            before = (time.perf_counter(), _own_seconds(), _cpu_seconds(pid))
            act()
            after = (time.perf_counter(), _own_seconds(), _cpu_seconds(pid))
            if step >= 3:
                rows[name].append(tuple(b - a for a, b in zip(before, after, strict=True)))  # type: ignore[arg-type]
    for optimizer in optimizers.values():
        optimizer.close(delete=True)
    means = {name: [statistics.fmean(column) for column in zip(*values, strict=True)] for name, values in rows.items()}
    copied = means["memcpy"][1]
    for name, (wall, client, server) in means.items():
        said = f"{1e3 * wall:.0f} ms, CPU {1e3 * client:.0f} + {1e3 * server:.0f} ms, {(client + server) / copied:.1f} x memcpy"
        checks.note(f"GPT-2 124M under sgd, {size / 2**20:.0f} MiB both ways, {name}", said)
    faster = [means["websocket"][0] / means["shm"][0], sum(means["websocket"][1:]) / sum(means["shm"][1:])]
    checks.add("shm against the socket", f"wall {faster[0]:.2f}x, CPU {faster[1]:.2f}x", "> 1, > 1", min(faster) > 1)


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
