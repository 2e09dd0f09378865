"""What is taken as a frame of the service."""

from __future__ import annotations

from typing import Any

import pytest

from muond import MuondError
from muond.wire.frame import check_frame, decode_frame, frame_error, is_known
from muond.wire.msgpack import encode

UPDATE = {"type": "update", "parameter": 0, "step": 1, "offset": 0}
ERROR = {"type": "error", "code": "STEP_CONFLICT", "message": "no", "status": 409, "retryable": False}


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({}, "a frame of type None"),
        ({"type": 1}, "a frame of type 1"),
        ({"type": "update"}, "update without 'parameter'"),
        ({**UPDATE, "parameter": -1}, "update.parameter = -1"),
        ({**UPDATE, "parameter": True}, "update.parameter as bool, expected int"),
        ({**UPDATE, "scale": "1"}, "update.scale as str, expected float"),
        ({**UPDATE, "replayed": 1}, "update.replayed as int, expected bool"),
        ({**ERROR, "status": 1.5}, "error.status as float, expected int"),
    ],
)
def test_what_is_no_frame_is_malformed(frame: dict[str, Any], words: str) -> None:
    with pytest.raises(MuondError, match=words) as caught:
        check_frame(frame)
    assert caught.value.code == "FRAME_MALFORMED"


def test_a_type_of_a_later_service_is_told() -> None:
    assert not is_known(check_frame({"type": "greeting", "words": -1}))
    assert is_known(check_frame(UPDATE))


def test_an_integer_is_taken_for_a_float_and_unknown_keys_pass() -> None:
    frame = {**UPDATE, "scale": 1, "decay": 0, "more": [1]}
    assert decode_frame(encode(frame)) == frame


def test_bytes_that_are_no_msgpack_are_malformed() -> None:
    with pytest.raises(MuondError, match="the service sent what is no frame: byte 0xc0: nil and extensions"):
        decode_frame(b"\x81\xa4type\xc0")


def test_an_error_frame_says_by_itself_whether_it_is_worth_a_retry() -> None:
    error = frame_error({**ERROR, "retryable": True, "step": 3, "expected_step": 2, "retry_after_seconds": 0.5})
    assert (error.code, error.status, error.retryable) == ("STEP_CONFLICT", 409, True)
    assert (error.fields.step, error.fields.expected_step, error.fields.retry_after_seconds) == (3, 2, 0.5)
    assert str(error) == "no [STEP_CONFLICT]"
