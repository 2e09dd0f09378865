"""Whether the Python client does on a GPU what it promises: run it once on a machine that has one.

    PYTHONPATH=clients/python/src python3 bench/python/gpu.py --service-command "node dist/src/server.js --device cuda"

Needs torch and numpy, and a built service. Prints a table, and with --out writes it as JSON; ends with 1 if a check
failed, and never takes longer than --seconds. `--device cpu` tries its logic on a machine without a GPU, less what only
a GPU has.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

# The service gets the environment as it was before the changes below, which are for torch alone.
_ENVIRONMENT = dict(os.environ)
# Before torch: without it cuBLAS may add in another order each time, and no two trainings are the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

import gpuchecks
from checks import Checks
from service import COMMAND, Served, serving


def main() -> int:
    options = _options()
    checks = Checks(options.seconds)
    end = threading.Timer(options.seconds, _give_up, (checks, options.seconds))
    end.daemon = True
    end.start()
    # If no Python thread can run any more, this one still can; the service ends with this process.
    faulthandler.dump_traceback_later(options.seconds + 3, exit=True)
    machine: dict[str, str] = {}
    try:
        device = _device(options.device)
        with serving(options.service_command, options.start_seconds, _ENVIRONMENT) as service:
            machine = _machine(device, service)
            print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n", flush=True)
            gpuchecks.run(checks, device, service.url, options.steps, step_time=not options.no_step_time)
    except Exception as error:
        checks.failed("everything was tried", error)
    print(checks.render())
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine, **checks.json()}, indent=2) + "\n")
    faulthandler.cancel_dump_traceback_later()
    return 0 if checks.hold else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service-command", default=COMMAND, help="starts the service; a --port is added")
    parser.add_argument("--device", default="cuda", help="where the model is")
    parser.add_argument("--steps", type=int, default=200, help="of the training that is compared with torch.optim")
    parser.add_argument("--seconds", type=float, default=80.0, help="after which it is over, whatever it does")
    parser.add_argument("--start-seconds", type=float, default=30.0, help="the service has until it is ready")
    parser.add_argument("--no-step-time", action="store_true", help="without the step of GPT-2 124M")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    return parser.parse_args()


def _device(name: str) -> torch.device:
    """The device with its index, its float32 products without TF32. Raises RuntimeError if there is no GPU."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    torch.cuda.init()
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


def _machine(device: torch.device, service: Served) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "trainer": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "service": service.device,
        "command": service.command,
        "cores": str(os.cpu_count()),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _give_up(checks: Checks, seconds: float) -> NoReturn:
    checks.failed(f"it ends within {seconds:.0f} s", TimeoutError(f"it was at: {checks.current}"))
    print(checks.render(), flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
