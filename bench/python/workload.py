"""The bytes that every measurement of the transport sends and receives: the same for every client."""

from __future__ import annotations

from typing import Any, Literal

Mode = Literal["send", "receive", "both"]

CHUNK_BYTES = 4 << 20
"""The service's default."""
PARAMETERS = 12
PARAMETER_BYTES = 2 * CHUNK_BYTES
STEPS = 10
"""The first step is not timed: it touches its memory for the first time."""
TIMED_BYTES = (STEPS - 1) * PARAMETERS * PARAMETER_BYTES
"""Bytes in each direction of a mode."""

SHAPE = (PARAMETER_BYTES // 2048, 1024)
"""Bytes of a parameter's gradient and of its update, which are bfloat16."""

OPENED: dict[str, Any] = {
    "type": "opened",
    "run": "bench",
    "epoch": 1,
    "step": 0,
    "resumed": False,
    "digest": "0",
    "ahead": [],
    "parameters": [
        {
            "index": index,
            "name": f"w{index}",
            "shape": list(SHAPE),
            "group": "all",
            "step": 0,
            "algorithm": "sgd",
            "gradient_dtype": "bfloat16",
            "update_dtype": "bfloat16",
        }
        for index in range(PARAMETERS)
    ],
    "attentions": [],
    "groups": {"all": {"algorithm": "sgd", "lr": 1.0}},
    "limits": {"chunk_bytes": CHUNK_BYTES},
    "server": {"name": "peer", "version": "0", "device": "none"},
}
