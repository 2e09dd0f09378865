"""Error feedback: what a gradient loses when it is encoded in blocks is added to the next one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch

from .blocks import decode, encode
from .slots import Slot

KEY = "error_feedback"
"""The name of a parameter's entry in ``optimizer.state``: float32, of the parameter's shape. It is the program's own, and the service
knows nothing of it."""


class Feedback:
    """``state`` gives ``optimizer.state``. What a step loses counts once the step is finished: one that is not is sent again."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self._state = state
        self._lost: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self) -> None:
        """A step begins: what an unfinished one before it has lost is none of it."""
        self._lost.clear()

    def encode(self, slot: Slot, gradient: torch.Tensor) -> torch.Tensor:
        """The bytes of a gradient and of what those before it have lost."""
        dtype = slot.declaration.gradient_dtype
        before = self._of(slot.tensor)
        wanted = gradient.float() if before is None else gradient.float() + before
        data = encode(wanted, dtype)
        self._lost[slot.index] = slot.tensor, wanted - decode(data, dtype, wanted.numel()).view(wanted.shape)
        return data

    def finish(self, refused: Container[int | None], *, contributed: bool) -> None:
        """The step is finished; what the service has refused, or has left out, has lost nothing."""
        for index, (tensor, lost) in self._lost.items():
            if contributed and index not in refused:
                self._state()[tensor][KEY] = lost
        self._lost.clear()

    def copied(self, tensors: Iterable[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
        """What each of these parameters has lost so far. It is never changed in place."""
        found = {tensor: self._of(tensor) for tensor in tensors}
        return {tensor: lost for tensor, lost in found.items() if lost is not None}

    def set(self, lost: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """What these parameters have lost, as another process had it."""
        for tensor, value in lost.items():
            self._state()[tensor][KEY] = value.to(tensor.device, copy=True)

    def go_back(self, tensors: Iterable[torch.Tensor], copied: Mapping[torch.Tensor, torch.Tensor]) -> None:
        """Goes back to what these parameters had lost when it was ``copied``."""
        for tensor in tensors:
            now = self._of(tensor)
            # To delete the entry would read the whole state from the service.
            if now is not None:
                self._state()[tensor][KEY] = copied[tensor] if tensor in copied else torch.zeros_like(now)

    def _of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        try:
            # `get` would read the whole state from the service.
            found: torch.Tensor = self._state()[tensor][KEY]
        except KeyError:
            return None
        return found
