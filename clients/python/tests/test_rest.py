"""A state's body: small tensors travel together, large ones from where they lie."""

from __future__ import annotations

import numpy as np
import pytest

from muond.rest import _TOGETHER_BYTES, Tensor, _pieces, _together
from muond.wire.safetensors import Described


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_body_and_no_small_one_goes_alone(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.choice(
        [0, 1, 1000, _TOGETHER_BYTES // 2, _TOGETHER_BYTES - 1, _TOGETHER_BYTES, 2 * _TOGETHER_BYTES], 12
    )
    arrays = [random.integers(0, 256, int(size), dtype=np.uint8) for size in sizes]
    tensors = [Tensor(str(i), "U8", (len(array),), array) for i, array in enumerate(arrays)]
    pieces = [bytes(piece) for piece in _pieces(b"head", tensors)]
    assert b"".join(pieces) == b"head" + b"".join(array.tobytes() for array in arrays)
    large = int((sizes >= _TOGETHER_BYTES).sum())
    together = sum(int(size) for size in sizes if size < _TOGETHER_BYTES)
    assert len(pieces) <= 2 * large + (together + len(b"head")) // _TOGETHER_BYTES + 1


def test_small_tensors_are_read_together_as_long_as_they_are_few_bytes() -> None:
    half = _TOGETHER_BYTES // 2
    sizes = [half, half, 1, 3 * half, 1]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    described = [
        Described(str(i), "U8", (size,), end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    together = [[tensor.name for tensor in some] for some in _together(described)]
    assert together == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(_together([])) == []
