"""Checks the hashes of a checkpoint of muond and prints its tensors: read_checkpoint.py FOLDER. Needs Python only."""

import hashlib
import json
import math
import pathlib
import sys


def verified(path: pathlib.Path, data: bytes, said: str) -> bytes:
    actual = hashlib.sha256(data).hexdigest()
    return data if actual == said else sys.exit(f"{path} has SHA-256 {actual}, expected {said}")


def norm(data: bytes, dtype: str) -> float:
    if dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return math.sqrt(math.fsum(value * value for value in memoryview(data).cast("f")))


folder = pathlib.Path(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
try:
    text = (folder / "manifest.json").read_bytes()
    body, _, said = text.rpartition(b',\n  "sha256": "')
    manifest = json.loads(verified(folder / "manifest.json", body, said[:64].decode() if body else "none") + b"}")
    rows = [("tensor", "dtype", "shape", "norm")]
    for name, said in ((file["name"], file["sha256"]) for file in manifest["files"]):
        data = verified(folder / name, (folder / name).read_bytes(), said)
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start]) if name.endswith(".safetensors") else {}
        for tensor, entry in ((key, value) for key, value in header.items() if key != "__metadata__"):
            own = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
            shape, dtype = "x".join(map(str, entry["shape"])), entry["dtype"]
            value = str(int.from_bytes(own, "little")) if dtype == "I64" else f"{norm(own, dtype):.6g}"
            rows.append((tensor, dtype, shape, value))
except (OSError, ValueError) as error:
    sys.exit(f"{folder}: {error}")
widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
print(f"run {manifest['run']}, step {manifest['step']}, digest {manifest['digest']}", *lines, sep="\n")
