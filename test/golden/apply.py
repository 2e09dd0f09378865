"""Makes apply.json: updates, and the bits that every client of this repository has after applying them.

The arithmetic is that of docs/protocol.md ("Arithmetic"), in exact fractions and with a rounding of its own, so that neither
client is its own judge. Needs Python only: python test/golden/apply.py
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Type:
    """A binary floating-point type: digits of its significand, smallest exponent of a normal number, bytes."""

    digits: int
    least: int
    bytes: int

    def round(self, exact: Fraction, sign: float) -> float:
        """To nearest, ties to even; ``sign`` is that of a zero."""
        if exact == 0:
            return math.copysign(0.0, sign)
        exponent = math.frexp(float(exact))[1] - 1
        while abs(exact) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        while abs(exact) < Fraction(2) ** exponent:
            exponent -= 1
        unit = Fraction(2) ** (max(exponent, self.least) - self.digits + 1)
        rounded = round(exact / unit) * unit
        if abs(rounded) >= Fraction(2) ** (2 - self.least):
            return math.copysign(math.inf, exact)
        return math.copysign(float(rounded), exact)

    def pack(self, value: float) -> bytes:
        if self.bytes == 8:
            return struct.pack("<d", value)
        if self is TYPES["float16"]:
            return struct.pack("<H", 0x7C00 | 0x8000 * (value < 0)) if math.isinf(value) else struct.pack("<e", value)
        return struct.pack("<f", value)[4 - self.bytes :]


TYPES = {
    "float64": Type(53, -1022, 8),
    "float32": Type(24, -126, 4),
    "bfloat16": Type(8, -126, 2),
    "float16": Type(11, -14, 2),
}


def product(a: float, b: float, kind: Type) -> float:
    sign = math.copysign(1, a) * math.copysign(1, b)
    return sign * math.inf if math.isinf(a) else kind.round(Fraction(a) * Fraction(b), sign)


def total(a: float, b: float, kind: Type) -> float:
    both_negative = math.copysign(1, a) < 0 and math.copysign(1, b) < 0
    return kind.round(Fraction(a) + Fraction(b), -1.0 if both_negative else 1.0)


def rounded(value: float, kind: Type) -> float:
    return value if math.isinf(value) else kind.round(Fraction(value), value)


def apply(weight: float, data: float | None, row: float | None, scale: float, decay: float, kind: Type) -> float:
    """One element; ``kind`` is the weight's own type."""
    wide = TYPES["float64"] if kind is TYPES["float64"] else TYPES["float32"]
    value = product(rounded(1.0 - decay, wide), weight, wide)
    if data is not None:
        value = total(value, product(rounded(scale, wide), data, wide), wide)
    if row is not None:
        value = product(row, value, wide)
    return rounded(value, kind)


# (weight, data) beside scale 2^-8 and decay 0: ties of bfloat16, sums that cancel, subnormal numbers, zeros, an overflow.
EDGES = [
    *[(1.0, 1.0), (1.0078125, 1.0), (-1.0, -1.0), (0.5, -128.0), (1.0, -256.0), (1.0, -255.5)],
    *[(1e-40, 1e-38), (-1e-40, 2e-38), (1e-45, 0.0), (0.0, 0.0), (-0.0, 0.0), (-0.0, -0.0)],
    *[(3.3e38, 3e38), (3.3e38, -3e38), (65504.0, 4096.0), (6e-8, 1e-6), (1.5, 3.0), (0.1, 0.3)],
]
ROWS, WIDTH = 3, 6


def elements(random: Random, kind: str) -> list[float]:
    return [rounded(random.gauss(0, 1), TYPES[kind]) for _ in range(ROWS * WIDTH)]


def case(
    title: str, weights: list[float], data: list[float] | None, rows: list[float] | None, **factors: object
) -> dict[str, object]:
    kind, update = TYPES[str(factors["weights_dtype"])], TYPES[str(factors["update_dtype"])]
    scale, decay = float(str(factors["scale"])), float(str(factors["decay"]))
    after = [
        apply(weight, data[i] if data else None, rows[i // WIDTH] if rows else None, scale, decay, kind)
        for i, weight in enumerate(weights)
    ]
    packed = {
        "weights": b"".join(map(kind.pack, weights)).hex(),
        "data": b"".join(map(update.pack, data)).hex() if data else None,
        "row_scale": b"".join(map(TYPES["float32"].pack, rows)).hex() if rows else None,
        "expected": b"".join(map(kind.pack, after)).hex(),
    }
    return {"title": title, **factors, **packed}


def cases() -> list[dict[str, object]]:
    random = Random(1)
    made = []
    for weights_dtype in TYPES:
        for update_dtype in ("float32", "bfloat16", "float16"):
            types = {"weights_dtype": weights_dtype, "update_dtype": update_dtype}
            kinds = f"{weights_dtype} weights, {update_dtype} data"
            rows = [rounded(value, TYPES["float32"]) for value in (1.0, 0.7, 1 / 3)]
            for name, factors in (("rows", rows), ("no rows", None)):
                weights, data = elements(random, weights_dtype), elements(random, update_dtype)
                made.append(case(f"{kinds}, {name}", weights, data, factors, scale=-0.0213, decay=0.002, **types))
            made.append(case(f"{kinds}, a large step", weights, data, None, scale=0.9, decay=0.3, **types))
            edges = [
                [rounded(pair[i], TYPES[kind]) for pair in EDGES] for i, kind in ((0, weights_dtype), (1, update_dtype))
            ]
            finite = [0.0 if math.isinf(value) else value for value in edges[1]]
            weights = [1.0 if math.isinf(value) else value for value in edges[0]]
            made.append(case(f"{kinds}, edges", weights, finite, None, scale=0.00390625, decay=0.0, **types))
            made.append(case(f"{kinds}, rows alone", weights, None, rows, scale=0.0, decay=0.0, **types))
    return made


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(made) for made in cases())
    Path(__file__).with_suffix(".json").write_text(f"[\n{lines}\n]\n")
