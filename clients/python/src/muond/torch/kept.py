"""The trainer's own weights of a checkpoint, so that it can go back to where the service can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..receipt import Checkpoint
from .slots import Slot


class Kept:  # pragma: no cover - until the service has checkpoints
    """A copy of the weights and of the hyperparameters, in host memory."""

    def __init__(self, checkpoint: Checkpoint, slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]]) -> None:
        self.checkpoint = checkpoint
        self._weights = [slot.tensor.detach().to("cpu", copy=True) for slot in slots]
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]

    @torch.no_grad()
    def restore(self, slots: Sequence[Slot], groups: Sequence[dict[str, Any]]) -> None:
        for slot, weights in zip(slots, self._weights, strict=True):
            slot.tensor.copy_(weights)
        for group, kept in zip(groups, self._groups, strict=True):
            group.update(kept)
