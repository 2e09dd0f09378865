"""What is sent and received in every measurement of the transport: the same bytes, whoever does it."""

from __future__ import annotations

from typing import Any, Literal

Mode = Literal["send", "receive", "both"]

CHUNK_BYTES = 4 << 20
"""As the service has it unless it is told otherwise."""
PARAMETERS = 12
PARAMETER_BYTES = 2 * CHUNK_BYTES
STEPS = 10
"""The first one is not timed: its memory is touched for the first time."""
TIMED_BYTES = (STEPS - 1) * PARAMETERS * PARAMETER_BYTES
"""In each direction of a mode."""

SHAPE = (PARAMETER_BYTES // 2048, 1024)
"""Of a parameter whose gradients and updates are bfloat16."""

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
