"""Tensors in blocks, held to test/golden/blocks.json, which the service and the Node client are held to as well."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from muond.wire.blocks import decode, encode
from muond.wire.dtype import BLOCKS, tensor_bytes
from service import ROOT

CASES: list[dict[str, Any]] = json.loads((ROOT / "test" / "golden" / "blocks.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
def test_the_bytes_are_those_that_every_program_encodes_and_decodes(case: dict[str, Any]) -> None:
    values = np.frombuffer(bytes.fromhex(case["values"]), "<f4")
    data = encode(values, case["dtype"])
    assert data.tobytes().hex() == case["bytes"]
    decoded = decode(np.frombuffer(bytes.fromhex(case["bytes"]), np.uint8), case["dtype"], len(values))
    np.testing.assert_array_equal(decoded, np.frombuffer(bytes.fromhex(case["decoded"]), "<f4"))
    assert (np.signbit(decoded) == np.signbit(np.frombuffer(bytes.fromhex(case["decoded"]), "<f4")))[
        np.isfinite(decoded)
    ].all()


@given(
    st.sampled_from(sorted(BLOCKS)),
    arrays(np.float32, st.integers(1, 600), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
)
def test_an_element_is_off_by_half_a_scale_at_most(dtype: str, values: Any) -> None:
    blocks = BLOCKS[dtype]
    data = encode(values, dtype)
    assert len(data) == tensor_bytes(dtype, len(values))
    decoded = decode(data, dtype, len(values)).astype(np.float64)
    for first in range(0, len(values), blocks.elements):
        block = slice(first, first + blocks.elements)
        # A bfloat16 has 8 digits, and none is smaller than 2^-133.
        scale = float(np.abs(values[block]).max()) / blocks.most * (1 + 2**-8)
        bound = max(0.5 * scale * (1 + 2**-20), blocks.most * 2.0**-134)
        assert (np.abs(decoded[block] - values[block].astype(np.float64)) <= bound).all()
