"""What the tensors of a frame may be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BYTES_PER_ELEMENT: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

SCALE_BYTES = 2


@dataclass(frozen=True)
class Blocks:
    """Integers in blocks (docs/protocol.md, "Tensors in blocks"): ``elements`` share one scale, a bfloat16 before their integers.

    Each integer has ``bits`` bits, and magnitude ``most`` at most.
    """

    elements: int
    bits: int
    most: int


BLOCKS: Mapping[str, Blocks] = {"int8_block256": Blocks(256, 8, 127), "int4_block64": Blocks(64, 4, 7)}


def is_dtype(name: str) -> bool:
    return name in BYTES_PER_ELEMENT or name in BLOCKS


def tensor_bytes(dtype: str, elements: int) -> int:
    """The bytes of a tensor of so many elements as it travels."""
    blocks = BLOCKS.get(dtype)
    if blocks is None:
        return elements * BYTES_PER_ELEMENT[dtype]
    whole, rest = divmod(elements, blocks.elements)
    return whole * _block_bytes(blocks, blocks.elements) + (_block_bytes(blocks, rest) if rest else 0)


def _block_bytes(blocks: Blocks, elements: int) -> int:
    return SCALE_BYTES + (elements * blocks.bits + 7) // 8
