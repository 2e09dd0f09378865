"""The optimizer's state between the service and torch, under torch's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...error import MuondError
from ...rest import Rest, Take, Tensor
from ...run import Run
from ..slots import Slot
from .fingerprint import on_host
from .kinds import complete_entries
from .place import Followed, require_place

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Entries = Mapping[str, Any]
"""What a state_dict has of one parameter: {name: tensor or number}."""


def read_state(rest: Rest, run: Run | Followed, slots: Sequence[Slot]) -> list[dict[str, torch.Tensor]]:
    """The state of every slot in host memory, in one request; empty for a parameter without a step.

    Raises MuondError, STEP_CONFLICT where the service is at another step than this client.
    """
    # Before the tensors: a step that another trainer has begun would be waited for.
    require_place(run, rest.run(run.name))
    by_slot: dict[str, dict[str, torch.Tensor]] = {}

    def begin() -> Take:
        by_slot.update((slot.name, {}) for slot in slots)
        return take

    def take(tensor: Tensor) -> None:
        parameter, _, name = tensor.name.removeprefix("state.").rpartition(".")
        if name != "step":
            by_slot[parameter][name] = _to_torch(tensor)
        elif (count := _count(tensor)) > 0:
            # torch's optimizers count steps in a float32 scalar.
            by_slot[parameter][name] = torch.scalar_tensor(float(count), dtype=torch.float32, device="cpu")

    metadata = rest.read_state(run.name, begin)
    require_place(run, {"step": int(metadata["step"]), "digest": metadata["digest"], "ahead": []})
    return [by_slot[slot.name] for slot in slots]


def read_begun(rest: Rest, run: Run | Followed, slots: Sequence[Slot]) -> list[bool]:
    """Whether the service has a state of each slot; no tensor is transferred. Raises MuondError as ``read_state`` does."""
    require_place(run, rest.run(run.name))
    counts = {
        tensor.name.removeprefix("state.").removesuffix(".step"): _count(tensor) for tensor in rest.counts(run.name)
    }
    return [counts[slot.name] > 0 for slot in slots]


def write_state(
    run: Run,
    state: Sequence[tuple[Slot, Mapping[str, Any], Entries]],
    *,
    partial: bool,
) -> None:
    """Gives a run the state of some parameters, each as (slot, its param_group, entries); no entries: none.

    ``partial``: every other parameter keeps what it has. Momentum buffers have the run's own form. Raises ValueError for entries
    that are no state, MuondError; the run is as it was then.
    """
    tensors = [
        _from_torch(f"state.{slot.name}.{name}", value)
        for slot, group, entries in state
        for name, value in complete_entries(slot.name, slot.shape, group, entries).items()
    ]
    run.import_state(tensors, {"format": "pt"}, partial=partial)


def _count(tensor: Tensor) -> int:
    return int.from_bytes(tensor.data, "little")


def _to_torch(tensor: Tensor) -> torch.Tensor:
    if tensor.dtype == "F32":
        # The elements of a tensor of its own: a view of bytes would be saved with all that lies beside them.
        return torch.from_numpy(tensor.data.view(np.float32).reshape(tensor.shape))
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise MuondError("DTYPE_UNSUPPORTED", f"state tensor '{tensor.name}' has dtype {tensor.dtype}")
    return torch.from_numpy(tensor.data).view(dtype).view(tensor.shape)


def _from_torch(name: str, value: Any) -> Tensor:
    tensor = on_host(value)
    if name.endswith(".step"):
        tensor = tensor.to(torch.int64)
    elif tensor.dtype == torch.float64:
        # torch keeps float64 state for float64 parameters; the service's is float32 for all.
        tensor = tensor.to(torch.float32)
    if tensor.dtype not in _NAMES:
        raise MuondError("DTYPE_UNSUPPORTED", f"{name} of the state_dict has dtype {tensor.dtype}")
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    return Tensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), data)
