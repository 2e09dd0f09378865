"""Processes that have the same weights and the same gradients (HSDP, DDP): one of them takes the steps, all have its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..error import MuondError
from ..receipt import Receipt

T = TypeVar("T")


class Copies:
    """All processes of a process group. Every method is a collective: all of them call it, in the same order."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = group
        self.is_first: bool = dist.get_rank(group) == 0

    def from_first(self, value: T) -> T:
        """What the first one gives."""
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, group_src=0, group=self._group)
        return told[0]

    def meet(self) -> None:
        """Waits until all are here."""
        import torch.distributed as dist

        dist.barrier(group=self._group)

    def take(self, step: Callable[[], Receipt | None], weights: Sequence[torch.Tensor]) -> Receipt | None:
        """Has the first one take a step; all have its receipt, or raise its error, and have its weights afterwards.

        What returns None has moved no weights. The first one does not begin before all are here: one that still reads the state,
        for a state_dict of the step before, would find it moved.

        The weights go to the others, not the update: they are what the step comes to, whatever its decay and row scales are, and
        all copies have the same bits even after an error in the middle of a step.
        """
        self.meet()
        receipt: Receipt | None = None
        error: BaseException | None = None
        if self.is_first:  # pragma: no cover - in processes of several copies, which are not measured
            try:
                receipt = step()
            except BaseException as failed:  # noqa: BLE001 - the others must not wait for one that has failed
                error = failed
        receipt, failure, has_moved = self.from_first((receipt, told(error), receipt is not None or error is not None))
        if has_moved:
            self._copy(weights)
        if error is not None:  # pragma: no cover - in processes of several copies, which are not measured
            raise error
        if failure is not None:
            raise failure
        return receipt

    def _copy(self, weights: Sequence[torch.Tensor]) -> None:
        import torch.distributed as dist

        # Memory in between for those that do not lie one element after the other: a collective takes no others.
        flat = [tensor.detach() for tensor in weights if tensor.numel() > 0]
        sent = [tensor.contiguous() for tensor in flat]
        works: list[Any] = [dist.broadcast(tensor, group_src=0, group=self._group, async_op=True) for tensor in sent]
        for work in works:
            work.wait()
        for tensor, copy in zip(flat, sent, strict=True):
            if (
                tensor is not copy and not self.is_first
            ):  # pragma: no branch - in other processes, which are not measured
                tensor.copy_(copy)


def told(error: BaseException | None) -> MuondError | None:
    """An error as the other copies raise it."""
    if error is None or isinstance(error, MuondError):
        return error
    return MuondError("CLIENT_CLOSED", f"the first copy of the model has failed: {type(error).__name__}: {error}")
