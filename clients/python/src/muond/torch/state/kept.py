"""The trainer's own weights of checkpoints, so that it can go back to where the service can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...receipt import Checkpoint
from ...run import Run
from ..feedback import Feedback
from ..slots import Slot


class Kept:
    """A copy of the weights and of the hyperparameters, in host memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tag: str,
        slots: Sequence[Slot],
        groups: Sequence[Mapping[str, Any]],
        feedback: Feedback | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.tag = tag
        self._weights = [slot.tensor.detach().to("cpu", copy=True) for slot in slots]
        self.feedback = {} if feedback is None else feedback.copied(slot.tensor for slot in slots)
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]

    @torch.no_grad()
    def restore(self, slots: Sequence[Slot], groups: Sequence[dict[str, Any]]) -> None:
        """Gradients are of weights that are gone, and go with them."""
        for slot, weights in zip(slots, self._weights, strict=True):
            slot.tensor.copy_(weights)
            slot.tensor.grad = None
        for group, kept in zip(groups, self._groups, strict=True):
            group.update(kept)


class Shelf:
    """The newest of those, at most so many. Each has a tag in the service, which else would keep newer ones of its own instead."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.kept: list[Kept] = []
        """Oldest first."""

    def keep(
        self, run: Run, slots: Sequence[Slot], groups: Sequence[Mapping[str, Any]], feedback: Feedback | None
    ) -> Checkpoint:
        """Takes a checkpoint and a copy. Raises MuondError; what was kept before is kept still."""
        staying = self.kept[-(self._most - 1) :] if self._most > 1 else []
        taken = {kept.tag for kept in staying}
        # A tag leads to the newest checkpoint that has it, so taking it away from the oldest one lets that go.
        tag = next(tag for tag in (f"kept.{number}" for number in range(self._most)) if tag not in taken)
        checkpoint = run.checkpoint(tag)
        self.kept = [*staying, Kept(checkpoint, tag, slots, groups, feedback)]
        return checkpoint
