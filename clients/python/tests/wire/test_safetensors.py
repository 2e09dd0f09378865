"""The safetensors header, both ways."""

from __future__ import annotations

import json
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muond.wire.safetensors import BYTES, read_header, write_header

tensors = st.dictionaries(
    st.text(min_size=1).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(BYTES)), st.lists(st.integers(0, 9), max_size=4).map(tuple)),
)


@given(tensors, st.dictionaries(st.text(), st.text()))
def test_what_is_written_is_read(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    head, length = write_header(tensors, metadata)
    assert len(head) % 8 == 0
    (size,) = struct.unpack("<Q", head[:8])
    described, read = read_header(head[8:])
    assert size == len(head) - 8
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in described} == tensors
    assert read == metadata
    assert sum(tensor.end - tensor.begin for tensor in described) == length


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], "is a map, this one is a list"),
        ({"a": {**F32, "data_offsets": [8, 16]}}, "'a' begins at byte 8, expected 0"),
        ({"a": {**F32, "data_offsets": [0, 4]}}, "'a' has 4 bytes, F32 of shape [2] has 8"),
        ({"a": {"dtype": "C64", "shape": [], "data_offsets": [0, 8]}}, "'a' is described as"),
        ({"a": {**F32, "data_offsets": [0]}}, "'a' is described as"),
        ({"a": None}, "'a' is described as None"),
    ],
)
def test_a_header_that_does_not_tile_its_body_is_refused(header: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read_header(json.dumps(header).encode())
