"""The optimizer's state between the service and a state_dict, under torch's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..error import MuondError
from ..rest import Rest, Tensor
from .slots import Slot, group_declarations

TOKEN = "muond"
"""The key of a state_dict that says which run, step and digest it belongs to."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_state(rest: Rest, run: str, slots: Sequence[Slot]) -> dict[int, dict[str, torch.Tensor]]:
    """{index: {name: tensor}} in host memory; nothing for a parameter without a step. Raises MuondError."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for slot in slots:
        tensors, _ = rest.parameter_state(run, slot.index)
        if tensors:
            state[slot.index] = {tensor.name: _to_torch(tensor) for tensor in tensors}
    return state


def write_state(
    rest: Rest,
    run: str,
    slots: Sequence[Slot],
    state: Mapping[int, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    momentum_form: str | None = None,
) -> None:
    """Replaces the whole state of a run by that of a state_dict, this package's or torch's. Raises MuondError.

    A parameter without entries has no state afterwards. Without ``momentum_form`` momentum buffers have the form of the run.
    """
    tensors = [
        _from_torch(f"state.{slot.name}.{name}", value)
        for slot in slots
        for name, value in _entries(slot, state.get(slot.index, {})).items()
    ]
    metadata = {"format": "muond", "param_groups": json.dumps(group_declarations(groups))}
    if momentum_form is not None:
        metadata["momentum_form"] = momentum_form
    rest.import_state(run, tensors, metadata)


def _entries(slot: Slot, entries: Mapping[str, Any]) -> dict[str, Any]:
    """With what torch leaves out: SGD's buffer before it has one, and the count of an optimizer that does not need it."""
    if not entries:
        return {"step": 0}
    given = {name: torch.zeros(slot.shape) if value is None else value for name, value in entries.items()}
    return {"step": 1, **given}


def _to_torch(tensor: Tensor) -> torch.Tensor:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise MuondError("DTYPE_UNSUPPORTED", f"state tensor '{tensor.name}' has dtype {tensor.dtype}")
    value = torch.from_numpy(tensor.data).view(dtype).view(tensor.shape)
    # torch's optimizers count steps in a float32 scalar.
    return value.to(torch.float32) if tensor.name == "step" else value


def _from_torch(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    if name.endswith(".step"):
        tensor = tensor.to(torch.int64)
    if tensor.dtype not in _NAMES:
        raise MuondError("DTYPE_UNSUPPORTED", f"{name} of the state_dict has dtype {tensor.dtype}")
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return Tensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), data)
