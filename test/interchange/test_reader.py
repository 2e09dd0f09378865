"""The reader of checkpoints that needs nothing but Python."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

ROOT = pathlib.Path(__file__).resolve().parents[2]
READER = ROOT / "examples" / "python" / "read_checkpoint.py"
SPEC = {
    "groups": [
        {"name": "hidden", "algorithm": "muon", "momentum_dtype": "bfloat16"},
        {"name": "rest", "algorithm": "adamw"},
    ],
    "parameters": [
        {"name": "up", "shape": [24, 16], "group": "hidden"},
        {"name": "bias", "shape": [17], "group": "rest"},
        {"name": "scalar", "shape": [], "group": "rest"},
    ],
}


def read(*arguments) -> subprocess.CompletedProcess:
    """Without any package, not even those that happen to be installed."""
    return subprocess.run([sys.executable, "-I", "-S", READER, *arguments], check=False, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkpoint(service):
    service.steps("reader", SPEC, 1, 3)
    return service.checkpoint("reader")


def test_every_tensor_is_in_the_table_with_its_norm(checkpoint):
    printed = read(checkpoint).stdout.splitlines()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert printed[0] == f"run reader, step 3, digest {manifest['digest']}"
    rows = {name: [dtype, *rest] for name, dtype, *rest in (line.split() for line in printed[2:])}
    assert rows.pop("state.up.step") == rows.pop("state.bias.step") == rows.pop("state.scalar.step") == ["I64", "3"]
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith(".step"):
                    continue
                tensor = tensors.get_tensor(name)
                dtype, *shape, norm = rows.pop(name)
                assert (dtype, shape) == (
                    "BF16" if name == "state.up.momentum_buffer" else "F32",
                    ["x".join(map(str, tensor.shape))] if tensor.shape else [],
                )
                assert float(norm) == pytest.approx(float(tensor.double().norm()), rel=1e-5)
    assert rows == {}


def test_it_is_short():
    assert len(READER.read_text().splitlines()) <= 40


def test_what_is_not_what_was_written_is_refused_with_both_hashes(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    for damage in ["state", "manifest", "cut", "gone"]:
        shutil.copytree(checkpoint, copy)
        state, manifest = next(copy.glob("state-*")), copy / "manifest.json"
        path = state if damage == "state" else manifest
        data = bytearray(path.read_bytes())
        data[-20 if damage == "state" else 30] ^= 1
        path.write_bytes(data)
        if damage == "cut":
            manifest.write_bytes(data[:100])
        if damage == "gone":
            state.unlink()
            manifest.write_bytes((checkpoint / "manifest.json").read_bytes())
        result = read(copy)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1), damage
        assert ("No such file" if damage == "gone" else f"{path} has SHA-256 ") in result.stderr
        shutil.rmtree(copy)


def test_without_a_folder_it_says_how_it_is_called():
    assert read().stderr.startswith("Checks the hashes of a checkpoint of muond")
