"""The service as a process, and the programs beside it, as the tests here use them."""

import json
import pathlib
import subprocess
import urllib.request
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVER = ROOT / "dist" / "src" / "server.js"
STEPS = ROOT / "dist" / "test" / "interchange" / "steps.js"


@dataclass
class Step:
    """What went in and out of one step: gradients, and updates W <- (1 - decay) W + scale * data, by parameter."""

    gradient: dict
    data: dict
    scale: dict
    decay: dict


class Service:
    def __init__(self, url: str, folder: pathlib.Path):
        self.url = url
        self.folder = folder
        self._files = 0

    def path(self, name: str) -> str:
        """A path that nothing stands at yet."""
        self._files += 1
        return str(self.folder / f"{self._files}-{name}")

    def steps(self, run: str, spec: dict, first: int, last: int) -> dict[int, Step]:
        spec_path, out = self.path("spec.json"), self.path("steps.safetensors")
        pathlib.Path(spec_path).write_text(json.dumps(spec))
        subprocess.run(["node", STEPS, self.url, run, spec_path, str(first), str(last), out], check=True)
        steps = {step: Step({}, {}, {}, {}) for step in range(first, last + 1)}
        with safe_open(out, "pt") as file:
            for name in file.keys():
                kind, step, parameter = name.split(".", 2)
                getattr(steps[int(step)], kind)[parameter] = file.get_tensor(name)
            for name, factors in json.loads(file.metadata()["factors"]).items():
                step, parameter = name.split(".", 1)
                steps[int(step)].scale[parameter] = factors["scale"]
                steps[int(step)].decay[parameter] = factors["decay"]
        return steps

    def checkpoint(self, run: str) -> pathlib.Path:
        """Takes one; its folder."""
        request = urllib.request.Request(f"{self.url}/v1/runs/{run}/checkpoints", method="POST")
        with urllib.request.urlopen(request) as response:
            taken = json.load(response)["checkpoint"]
        return self.folder / "data" / "runs" / run / "checkpoints" / taken

    def muond(self, *arguments: str) -> str:
        """What a command prints; raises CalledProcessError with its stderr where it fails."""
        command = ["node", SERVER, *arguments, "--url", self.url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def state(self, run: str) -> dict[str, torch.Tensor]:
        out = self.path("state.safetensors")
        self.muond("export", run, "--to", "safetensors", "--out", out)
        with safe_open(out, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interchange")
    command = ["node", SERVER, "--port", "0", "--device", "cpu", "--lanes", "1", "--staging-bytes", "8388608"]
    command += ["--data", folder / "data"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        listening = json.loads(process.stdout.readline())
        yield Service(listening["address"], folder)
    finally:
        process.terminate()
        process.wait()
