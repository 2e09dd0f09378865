"""The part of msgpack that the protocol uses: map, array, string, bin, integer, float and bool.

The ``msgpack`` package is not used because of one thing that it cannot do: decode a map up to its last key, ``data``, and say
where those bytes begin, while they are still on their way. That is what lets the kernel write an update straight into its memory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 8


class Incomplete(Exception):  # noqa: N818 - not an error: more bytes are on their way
    """The bytes end before the value does."""


class Malformed(ValueError):  # noqa: N818 - reads as what it is
    """The bytes are not what the protocol allows."""


def encode(value: Any) -> bytes:
    """Encodes one value.

    Raises ValueError for an integer beyond 2^53 - 1 and TypeError for anything without a form, None among it (a key without a
    value is left out); both name the path of keys.
    """
    out = bytearray()
    _encode(out, value, "value")
    return bytes(out)


def encode_head(frame: Mapping[str, Any], data_length: int) -> bytes:
    """Encodes a frame up to and including the bin header of its last key, ``data``, whose bytes follow from elsewhere."""
    out = bytearray(_counted(len(frame) + 1, 0x80, 16, (None, 0xDE, 0xDF)))
    for key, value in frame.items():
        out += _text(key)
        _encode(out, value, key)
    return bytes(out) + b"\xa4data" + _counted(data_length, None, 0, (0xC4, 0xC5, 0xC6))


def _encode(out: bytearray, value: Any, path: str) -> None:
    if isinstance(value, str):
        out += _text(value)
    elif isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy's is neither bool nor int
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, (int, Integral)):
        out += _integer(int(value), path)
    elif isinstance(value, (float, Real)):
        out += b"\xcb" + struct.pack(">d", float(value))
    elif isinstance(value, (dict, Mapping)):
        out += _counted(len(value), 0x80, 16, (None, 0xDE, 0xDF))
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path}: the key {key!r} is a {type(key).__name__}, expected a str")
            _encode(out, key, key)
            _encode(out, item, f"{path}.{key}")
    elif isinstance(value, (bytes, bytearray, memoryview)):
        out += _counted(len(value), None, 0, (0xC4, 0xC5, 0xC6)) + value
    elif isinstance(value, Sequence):
        out += _counted(len(value), 0x90, 16, (None, 0xDC, 0xDD))
        for index, item in enumerate(value):
            _encode(out, item, f"{path}[{index}]")
    else:
        raise TypeError(f"{path} is a {type(value).__name__}, which has no form in the protocol")


# The keys of frames are few, and each is written thousands of times.
@lru_cache(256)
def _text(value: str) -> bytes:
    text = value.encode()
    return _counted(len(text), 0xA0, 32, (0xD9, 0xDA, 0xDB)) + text


def _integer(value: int, path: str) -> bytes:
    if abs(value) > MAX_INTEGER:
        raise ValueError(f"{path} is {value}, beyond 2^53 - 1")
    if -32 <= value < 128:
        return struct.pack("b" if value < 0 else "B", value)
    sizes = (8, 16, 32, 64)
    first, forms = (0xCC, "BHIQ") if value >= 0 else (0xD0, "bhiq")
    bits = value.bit_length() if value >= 0 else (~value).bit_length() + 1
    index = next(i for i, size in enumerate(sizes) if bits <= size)
    return struct.pack(f">B{forms[index]}", first + index, value)


def _counted(count: int, short: int | None, limit: int, codes: tuple[int | None, int | None, int]) -> bytes:
    if short is not None and count < limit:
        return bytes((short | count,))
    for code, form, most in zip(codes, "BHI", (0xFF, 0xFFFF, 0xFFFFFFFF), strict=True):
        if code is not None and count <= most:
            return struct.pack(f">B{form}", code, count)
    raise ValueError(f"{count} items or bytes, at most {0xFFFFFFFF}")


def decode(buffer: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Decodes one message: one map and nothing after it. Raises Malformed. Bins are copied."""
    reader = _Reader(buffer)
    try:
        value = reader.value(0)
    except Incomplete:
        raise Malformed(f"the message of {len(buffer)} bytes ends inside a value") from None
    if not isinstance(value, dict):
        raise Malformed(f"a message is one map, this one is a {type(value).__name__}")
    if reader.position != len(buffer):
        raise Malformed(f"{len(buffer) - reader.position} bytes after the map")
    return value


def decode_head(buffer: bytes | bytearray | memoryview) -> tuple[dict[str, Any], int, int] | None:
    """Decodes a frame whose last key is a bin ``data`` without it: the other keys, where its bytes begin, how many there are.

    None if the message is whole without such a key. Raises Incomplete if more bytes are needed to know, and Malformed.
    """
    reader = _Reader(buffer)
    pairs = reader.map_length()
    frame: dict[str, Any] = {}
    for pair in range(pairs):
        key = reader.key(frame)
        if key == "data" and pair == pairs - 1:
            length = reader.bin_length()
            return frame, reader.position, length
        frame[key] = reader.value(1)
    return None


class _Reader:
    __slots__ = ("end", "position", "view")

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        self.view = memoryview(buffer)
        self.position = 0
        self.end = len(self.view)

    def take(self, count: int) -> memoryview:
        begin = self.position
        end = begin + count
        if end > self.end:
            raise Incomplete
        self.position = end
        return self.view[begin:end]

    def byte(self) -> int:
        position = self.position
        if position >= self.end:
            raise Incomplete
        self.position = position + 1
        return self.view[position]

    def number(self, form: struct.Struct) -> Any:
        begin = self.position
        end = begin + form.size
        if end > self.end:
            raise Incomplete
        self.position = end
        return form.unpack_from(self.view, begin)[0]

    def map_length(self) -> int:
        code = self.byte()
        if code & 0xF0 == 0x80:
            return code & 0x0F
        if code in (0xDE, 0xDF):
            return int(self.number(_U16 if code == 0xDE else _U32))
        raise Malformed(f"a message is one map, this one begins with byte {code:#04x}")

    def bin_length(self) -> int:
        code = self.byte()
        if code not in _BIN:
            raise Malformed(f"data begins with byte {code:#04x}, expected a bin")
        return int(self.number(_BIN[code]))

    def key(self, taken: Mapping[str, Any]) -> str:
        key = self.value(1)
        if not isinstance(key, str):
            raise Malformed(f"the key {key!r} is no string")
        if key in taken:
            raise Malformed(f"the key '{key}' is there twice")
        return key

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH}")
        code = self.byte()
        if code <= 0x7F:
            return code
        if code <= 0x8F:
            return self.map(code & 0x0F, depth)
        if code <= 0x9F:
            return self.list(code & 0x0F, depth)
        if code <= 0xBF:
            # Most of a frame is short strings: without the calls of `string` and `take` it is read in half the time.
            begin = self.position
            end = self.position = begin + (code & 0x1F)
            if end > self.end:
                raise Incomplete
            return self.text(self.view[begin:end])
        if code >= 0xE0:
            return code - 0x100
        return self.long(code, depth)

    def long(self, code: int, depth: int) -> Any:
        if code in (0xC2, 0xC3):
            return code == 0xC3
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in _BIN:
            return bytes(self.take(self.number(_BIN[code])))
        if code in _COUNTED:
            form, read = _COUNTED[code]
            count = self.number(form)
            return self.string(count) if read == "string" else getattr(self, read)(count, depth)
        raise Malformed(f"byte {code:#04x}: nil and extensions are not part of the protocol")

    def string(self, length: int) -> str:
        return self.text(self.take(length))

    @staticmethod
    def text(data: memoryview) -> str:
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"a string is not UTF-8: {error.reason}") from None

    def list(self, count: int, depth: int) -> Any:
        self.plausible(count)
        return self.floats(count) or [self.value(depth + 1) for _ in range(count)]

    def floats(self, count: int) -> Any:
        """A long list of nothing but float64s, in a tenth of the time; None for any other."""
        begin, end = self.position, self.position + count * _FLOAT_ITEM.size
        if count < _MANY or end > self.end or bytes(self.view[begin : end : _FLOAT_ITEM.size]) != b"\xcb" * count:
            return None
        self.position = end
        return [value for _, value in _FLOAT_ITEM.iter_unpack(self.view[begin:end])]

    def map(self, count: int, depth: int) -> dict[str, Any]:
        self.plausible(2 * count)
        items: dict[str, Any] = {}
        for _ in range(count):
            key = self.key(items)
            items[key] = self.value(depth + 1)
        return items

    def plausible(self, count: int) -> None:
        # Every item has a byte at least, so a count beyond the bytes left ends here and not after as many turns.
        if count > self.end - self.position:
            raise Incomplete


_MANY = 8
_FLOAT_ITEM = struct.Struct(">Bd")
_U8, _U16, _U32 = (struct.Struct(f">{form}") for form in "BHI")
_BIN = {0xC4: _U8, 0xC5: _U16, 0xC6: _U32}
_NUMBERS = {
    code: struct.Struct(f">{form}")
    for code, form in {
        0xCA: "f",
        0xCB: "d",
        **dict(zip(range(0xCC, 0xD0), "BHIQ", strict=True)),
        **dict(zip(range(0xD0, 0xD4), "bhiq", strict=True)),
    }.items()
}
_COUNTED: dict[int, tuple[struct.Struct, str]] = {
    0xD9: (_U8, "string"),
    0xDA: (_U16, "string"),
    0xDB: (_U32, "string"),
    0xDC: (_U16, "list"),
    0xDD: (_U32, "list"),
    0xDE: (_U16, "map"),
    0xDF: (_U32, "map"),
}
