"""The frames of the stream protocol, version 1 (docs/protocol.md): what the service sends is checked once, here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..error import ErrorFields, MuondError, malformed
from .msgpack import Malformed, decode

PROTOCOL = 1

Frame = dict[str, Any]

# The keys that must be there and those that may; keys that this version does not know are passed on. float takes an int too.
_REQUIRED: Mapping[str, Mapping[str, type]] = {
    "opened": {
        "run": str,
        "epoch": int,
        "step": int,
        "resumed": bool,
        "digest": str,
        "ahead": list,
        "groups": dict,
        "limits": dict,
        "server": dict,
    },
    "moved": {"run": str, "url": str},
    "placed": {
        "run": str,
        "generation": int,
        "step": int,
        "resumed": bool,
        "digest": str,
        "shards": list,
        "limits": dict,
        "server": dict,
    },
    "update": {"parameter": int, "step": int, "offset": int},
    "updates": {
        "step": int,
        "replayed": bool,
        "parameters": list,
        "scale": list,
        "decay": list,
        "gradient_norm": list,
        "update_rms": list,
    },
    "receipt": {
        "step": int,
        "replayed": bool,
        "applied": int,
        "skipped": int,
        "gradient_norm": float,
        "groups": dict,
        "clipped_heads": dict,
        "digest": str,
        "durable": bool,
        "seconds": dict,
    },
    "checkpointed": {"checkpoint": str, "step": int, "digest": str, "bytes": int},
    "error": {"code": str, "message": str, "status": int, "retryable": bool},
    "members": {"members": list},
    "draining": {"deadline_seconds": float},
}
_OPTIONAL: Mapping[str, Mapping[str, type]] = {
    "opened": {"transport": dict, "member": dict, "members": list, "quorum": dict},
    "updates": {"row_scale": dict},
    "update": {
        "scale": float,
        "decay": float,
        "row_scale": bytes,
        "replayed": bool,
        "gradient_norm": float,
        "update_rms": float,
        "data": bytes,
    },
    "receipt": {"max_logit": float, "contributors": list, "contributed": bool},
    "error": {"parameter": int, "step": int, "expected_step": int, "retry_after_seconds": float, "left_out": bool},
}


def decode_frame(message: bytes | bytearray | memoryview) -> Frame:
    """Decodes and checks one message of the service. Raises MuondError FRAME_MALFORMED."""
    try:
        return check_frame(decode(message))
    except Malformed as error:
        raise malformed(f"the service sent what is no frame: {error}") from error


def check_frame(frame: Frame) -> Frame:
    """Returns the frame if every key of its type has the right type. Raises MuondError FRAME_MALFORMED.

    The service may have types that this version does not know: ``is_known`` tells.
    """
    name = frame.get("type")
    if not isinstance(name, str):
        raise malformed(f"the service sent a frame of type {name!r}")
    if not is_known(frame):
        return frame
    for key, kind in _REQUIRED[name].items():
        if key not in frame:
            raise malformed(f"the service sent {name} without '{key}'")
        _check(name, key, frame[key], kind)
    for key, kind in _OPTIONAL.get(name, {}).items():
        if key in frame:
            _check(name, key, frame[key], kind)
    return frame


def is_known(frame: Frame) -> bool:
    """Whether this version knows frames of this type; others are to be ignored."""
    return frame["type"] in _REQUIRED


def _check(name: str, key: str, value: Any, kind: type) -> None:
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise malformed(f"the service sent {name}.{key} as {type(value).__name__}, expected {kind.__name__}")
    if kind is int and value < 0:
        raise malformed(f"the service sent {name}.{key} = {value}, expected 0 or more")


def frame_error(frame: Frame, refused: tuple[str, ...] = ()) -> MuondError:
    """The error that an error frame carries; the service's word on ``retryable`` counts."""
    keys = ("parameter", "step", "expected_step", "retry_after_seconds", "left_out")
    fields = ErrorFields(**{key: frame[key] for key in keys if key in frame}, refused=refused)
    return MuondError(frame["code"], frame["message"], fields, status=frame["status"], retryable=frame["retryable"])


MemberKey = int | tuple[int, int]
"""A member of a run by its rank, in a run with several replicas by (replica, rank)."""


def members_of(frame: Frame) -> dict[MemberKey, bool]:
    """Whether each member that a frame tells of has a connection."""
    return {
        (member["replica"], member["rank"]) if "replica" in member else member["rank"]: member["connected"]
        for member in frame.get("members", [])
    }
