"""Makes blocks.json: float32 tensors, what every program of this repository encodes them to in blocks, and decodes again.

The format is that of docs/protocol.md ("Tensors in blocks"), in exact fractions and with the rounding of apply.py. Needs Python
only: python test/golden/blocks.py
"""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction
from pathlib import Path
from random import Random

from apply import TYPES

FORMATS = {"int8_block256": (256, 127), "int4_block64": (64, 7)}


def pack(integers: list[int], dtype: str) -> bytes:
    if dtype == "int8_block256":
        return struct.pack(f"{len(integers)}b", *integers)
    even = integers + [0] * (len(integers) % 2)
    return bytes((low & 15) | (high & 15) << 4 for low, high in zip(even[::2], even[1::2], strict=True))


def encode(block: list[float], dtype: str, most: int) -> tuple[bytes, list[float]]:
    if not all(map(math.isfinite, block)):
        return bytes.fromhex("c07f") + pack([0] * len(block), dtype), [math.nan] * len(block)
    largest = max(map(abs, block))
    scale = TYPES["bfloat16"].round(Fraction(TYPES["float32"].round(Fraction(largest) / most, 1)), 1)
    quotients = [TYPES["float32"].round(Fraction(x) / Fraction(scale), x) if scale else 0.0 for x in block]
    integers = [max(-most, min(most, round(Fraction(q)))) for q in quotients]
    values = [float(Fraction(integer) * Fraction(scale)) for integer in integers]
    return TYPES["bfloat16"].pack(scale) + pack(integers, dtype), values


def case(title: str, values: list[float], dtype: str) -> dict[str, str]:
    size, most = FORMATS[dtype]
    blocks = [encode(values[first : first + size], dtype, most) for first in range(0, len(values), size)]
    decoded = [value for _, some in blocks for value in some]
    return {
        "title": f"{dtype}, {title}",
        "dtype": dtype,
        "values": struct.pack(f"<{len(values)}f", *values).hex(),
        "bytes": b"".join(data for data, _ in blocks).hex(),
        "decoded": struct.pack(f"<{len(decoded)}f", *decoded).hex(),
    }


def float32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def cases() -> list[dict[str, str]]:
    random = Random(1)
    made = []
    for dtype, (size, most) in FORMATS.items():
        normal = [TYPES["float32"].round(Fraction(random.gauss(0, 0.01)), 1) for _ in range(size + 5)]
        made.append(case("the example of docs/protocol.md", [1.0, -0.5, 0.25], dtype))
        made.append(case("a whole block and a short one", normal, dtype))
        made.append(case("one element", [-3.0], dtype))
        made.append(case("zeros", [0.0, -0.0, 0.0], dtype))
        # Scale 1, so that these quotients are ties.
        made.append(case("ties", [float(most), *(k + 0.5 for k in range(-most, most))], dtype))
        made.append(case("the largest numbers", [float32(0x7F7FFFFF), -float32(0x7F7FFFFF), 1.0], dtype))
        made.append(case("subnormal numbers", [float32(1 << 23), -float32(1 << 22), float32(1)], dtype))
        made.append(case("a subnormal scale", [float32(11 << 20), float32(150 << 16), -float32(11 << 20)], dtype))
        made.append(case("a scale that is rounded to 0", [float32(1), -float32(2)], dtype))
        made.append(case("Inf in the first block, none in the second", [math.inf, *normal[1:]], dtype))
        made.append(case("NaN", [1.0, math.nan], dtype))
    return made


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(made) for made in cases())
    Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n")
