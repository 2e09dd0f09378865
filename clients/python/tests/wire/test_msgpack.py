"""Our part of msgpack against the msgpack package, on random values, cut bytes and what the protocol does not allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muond.wire.msgpack import MAX_INTEGER, Incomplete, Malformed, decode, decode_head, encode, encode_head
from service import ROOT

integers = st.integers(-MAX_INTEGER, MAX_INTEGER)
scalars = st.one_of(integers, st.floats(allow_nan=False), st.booleans(), st.text(), st.binary())
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=20
)
frames = st.dictionaries(st.text(), values, max_size=20)


@given(frames)
def test_what_is_encoded_the_msgpack_package_reads(frame: dict[str, Any]) -> None:
    assert msgpack.unpackb(encode(frame), strict_map_key=False) == frame


@given(frames)
def test_what_the_msgpack_package_writes_is_decoded(frame: dict[str, Any]) -> None:
    assert decode(msgpack.packb(frame)) == frame


@given(st.floats(width=32, allow_nan=False))
def test_a_float_of_32_bits_is_decoded(value: float) -> None:
    assert decode(msgpack.packb({"x": value}, use_single_float=True)) == {"x": value}


@pytest.mark.parametrize("count", [0, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_lengths_on_both_sides_of_every_form(count: int) -> None:
    frame = {"text": "a" * count, "bin": bytes(count), "list": [1] * count, "map": {str(i): i for i in range(count)}}
    assert msgpack.unpackb(encode(frame)) == frame
    assert decode(msgpack.packb(frame)) == frame


@pytest.mark.parametrize("exponent", range(54))
def test_integers_on_both_sides_of_every_power_of_two(exponent: int) -> None:
    for value in (2**exponent - 1, 2**exponent, -(2**exponent), -(2**exponent) - 1):
        if abs(value) <= MAX_INTEGER:
            assert encode({"x": value}) == msgpack.packb({"x": value})


def test_numpy_numbers_are_numbers() -> None:
    frame = {"a": np.float32(0.5), "b": np.int64(-7), "c": np.bool_(True), "d": (np.uint8(200), np.float64(1.5))}
    assert decode(encode(frame)) == {"a": 0.5, "b": -7, "c": True, "d": [200, 1.5]}


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"a": {"b": [1, None]}}, TypeError, "a.b[1] is a NoneType"),
        ({"a": 2**53}, ValueError, "a is 9007199254740992, beyond 2^53 - 1"),
        ({"a": {1: 2}}, TypeError, "the key 1 is a int"),
        ({"a": 1j}, TypeError, "a is a complex"),
    ],
)
def test_what_has_no_form_is_refused_with_its_path(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        encode(value)


def test_data_longer_than_a_bin_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match="4294967296 items or bytes, at most 4294967295"):
        encode_head({}, 2**32)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "ends inside a value"),
        (b"\x01", "a message is one map"),
        (b"\x80\x00", "1 bytes after the map"),
        (b"\x81\xa1a\xc0", "nil and extensions"),
        (b"\x81\xa1a\xc1", "nil and extensions"),
        (b"\x81\xa1a\xd4\x00\x00", "nil and extensions"),
        (b"\x81\x01\x01", "is no string"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' is there twice"),
        (b"\x81\xa1a\xa1\xff", "not UTF-8"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "ends inside a value"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff", "ends inside a value"),
        (b"\x81\xa1a" + b"\x91" * 9 + b"\x01", "nested deeper than 8"),
    ],
)
def test_what_the_protocol_does_not_allow_is_malformed(message: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=re.escape(words)):
        decode(message)


@given(frames, st.data())
def test_cut_bytes_are_malformed_and_nothing_else(frame: dict[str, Any], data: st.DataObject) -> None:
    message = encode(frame)
    with pytest.raises(Malformed):
        decode(message[: data.draw(st.integers(0, len(message) - 1))])


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_malformed(message: bytes) -> None:
    try:
        decoded = decode(message)
    except Malformed:
        return
    assert isinstance(decoded, dict)


heads = st.dictionaries(st.text().filter(lambda key: key != "data"), values, max_size=17)


@given(heads, st.integers(0, 70_000))
def test_a_head_and_its_bytes_are_one_message(frame: dict[str, Any], length: int) -> None:
    data = bytes(length)
    head = encode_head(frame, length)
    assert decode(head + data) == {**frame, "data": data}
    assert decode_head(head + data[:100]) == (frame, len(head), length)


@given(heads, st.data())
def test_a_head_that_is_not_all_there_is_incomplete(frame: dict[str, Any], data: st.DataObject) -> None:
    head = encode_head(frame, 1000)
    with pytest.raises(Incomplete):
        decode_head(head[: data.draw(st.integers(0, len(head) - 1))])


def test_a_head_of_more_keys_than_the_short_form_has() -> None:
    frame = {f"key {i}": i for i in range(20)}
    head = encode_head(frame, 3)
    assert decode_head(head + b"abc") == (frame, len(head), 3)


def test_a_message_without_data_last_has_no_head() -> None:
    assert decode_head(encode({"a": 1})) is None
    assert decode_head(encode({"data": b"1", "a": 1})) is None


@pytest.mark.parametrize("message", [b"\x81\xa4data\x01", b"\x91\x01", b"\xc0"])
def test_a_head_whose_data_is_no_bin_or_that_is_no_map_is_malformed(message: bytes) -> None:
    with pytest.raises(Malformed):
        decode_head(message)


def test_the_worked_example_of_the_protocol_is_what_we_write_and_read() -> None:
    frames = _worked_example()
    assert list(frames) == ["open", "opened", "gradient", "update", "end", "receipt"]
    for name in ("open", "end"):
        assert encode(decode(frames[name])) == frames[name]
    gradient = decode(frames["gradient"])
    data = gradient.pop("data")
    assert encode_head(gradient, len(data)) + data == frames["gradient"]
    assert decode(frames["receipt"])["digest"].startswith("a85b8e000b4507c3")
    found = decode_head(frames["update"])
    assert found is not None
    assert found[0]["scale"] == -0.5
    assert frames["update"][found[1] :] == np.array([1, 2, 3, 4], "<f4").tobytes()


def _worked_example() -> dict[str, bytes]:
    text = (Path(ROOT) / "docs" / "protocol.md").read_text()
    # The frames of the only member; those of two ranks come behind.
    blocks = re.findall(r"### [1-6]\. `(\w+)`.*?```text\n(.*?)```", text, re.DOTALL)
    return {name: bytes.fromhex("".join(line.split("#")[0] for line in block.splitlines())) for name, block in blocks}
