"""Measures what the Python client costs on this machine, with `--step` also a step of GPT-2 124M.

Needs the package (`pip install -e 'clients/python[torch,dev]'`, or PYTHONPATH=clients/python/src and its dependencies),
and for `--step` a built service. Prints tables, and writes what it measured into bench/results/python.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import transport
from table import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "python.json"


def main() -> None:
    options = _options()
    sections: dict[str, Any] = {}
    if options.rounds > 0:
        machine = _machine()
        rows = transport.measure(options.rounds, options.congestion, _progress)
        machine |= {"congestion_of_both_ends": options.congestion, "rounds": options.rounds}
        sections["transport"] = {"machine": machine, **transport.as_json(rows)}
        _show(machine, transport.render(rows))
    if options.step:
        machine = _machine()
        found, service = _steps(options)
        machine |= {"service": service, "batch": options.batch, "length": options.length}
        sections["step"] = {"machine": machine, "rows": found}
        _show(machine, _step_table(found))
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.write_text(json.dumps({**before, **sections}, indent=2) + "\n")
    _progress(f"written into {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of the transport; 0 leaves it out")
    parser.add_argument(
        "--congestion", default="cubic", help="TCP congestion control of the peer; default: the kernel's"
    )
    parser.add_argument("--step", action="store_true", help="also a step of GPT-2 124M, with and without overlap")
    parser.add_argument("--algorithms", default="adamw,muon", help="of that step; muon has AdamW for what is no matrix")
    parser.add_argument("--steps", type=int, default=3, help="that count, after one that does not")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--device", default="cpu", help="where the model is")
    parser.add_argument("--service-command", help="default: the service of this checkout, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def _steps(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    # Only here: the transport needs no torch.
    from dataclasses import asdict

    import torch

    from service import COMMAND, serving
    from steptime import step_times

    command = options.service_command or f"{COMMAND} --device cpu"
    found = []
    with serving(command, 60.0) as service:
        for algorithm in options.algorithms.split(","):
            for overlap in (False, True):
                run = f"{algorithm}{'-overlap' if overlap else ''}"
                _progress(f"step of GPT-2 124M: {run}")
                time_of = step_times(
                    torch.device(options.device),
                    service.url,
                    run,
                    algorithm=algorithm,
                    overlap=overlap,
                    steps=options.steps,
                    tokens=(options.batch, options.length + 1),
                )
                found.append(asdict(time_of))
        return found, f"{service.command} ({service.device})"


def _step_table(found: list[dict[str, Any]]) -> str:
    head = ("step of GPT-2 124M", "overlap", "s", "backward", "step()", "least", "most")
    return table(
        head,
        [
            (
                row["algorithm"],
                "yes" if row["overlap"] else "no",
                *(f"{row[key]:.2f}" for key in ("whole", "backward", "step")),
                *(f"{of(row['all']):.2f}" for of in (min, max)),
            )
            for row in found
        ],
    )


def _machine() -> dict[str, Any]:
    packages = ("numpy", "torch", "websockets")
    versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
        "load_before": os.getloadavg()[0],
        "tcp_congestion_control": control.read_text().strip() if control.exists() else "unknown",
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _show(machine: dict[str, Any], text: str) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end=f"\n\n{text}\n\n", flush=True)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
