"""The ranks of a trainer: they are the members of one run, and do together what each cannot alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..error import MuondError
from .copies import Copies
from .slots import Slot

T = TypeVar("T")


class Ranks:
    """The processes that are the members of a run. Every method is a collective: all ranks call it, in the same order."""

    def __init__(self, group: Any, rank: int, world_size: int, device: torch.device | str) -> None:
        """``device``: where the tensors of its collectives are."""
        self._group = group
        self._device = device
        self.rank = rank
        self.world_size = world_size

    @staticmethod
    def along(mesh: Any, dimension: int = 0) -> Ranks:
        return Ranks(mesh.get_group(dimension), mesh.get_local_rank(dimension), mesh.size(dimension), mesh.device_type)

    def from_first(self, value: T) -> T:
        """What rank 0 gives."""
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, group_src=0, group=self._group)
        return told[0]

    def of_all(self, value: T) -> list[T]:
        """What each rank gives, in their order."""
        import torch.distributed as dist

        told: list[Any] = [None] * self.world_size
        dist.all_gather_object(told, value, group=self._group)
        return told

    def any(self, holds: bool) -> bool:
        """Whether it holds on some rank."""
        import torch.distributed as dist

        flag = torch.tensor(float(holds), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def together(self, work: Callable[[], T], undo: Callable[[T], None]) -> T:
        """Does ``work`` on every rank. Where one fails, all raise, and what the others have done is undone."""
        done: list[T] = []
        error: Exception | None = None
        try:
            done.append(work())
        except (MuondError, ValueError) as failed:
            error = failed
        told = self.of_all(None if error is None else f"{type(error).__name__}: {error}")
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if not failures:
            return done[0]
        for one in done:
            undo(one)
        raise error or MuondError("RUN_MISMATCH", f"another rank cannot open the run: {failures[0]}")


def ranks_of(slots: Sequence[Slot]) -> Ranks | None:
    """The ranks that have shards of the parameters; None where every parameter is whole.

    Raises ValueError for parameters of several meshes, or of which some are sharded and some are not.
    """
    sharded = [slot for slot in slots if slot.shard is not None]
    if not sharded:
        return None
    whole = next((slot for slot in slots if slot.shard is None), None)
    if whole is not None:
        raise ValueError(
            f"parameter '{whole.name}' is whole on every rank, '{sharded[0].name}' is sharded: shard all parameters of one "
            "optimizer (fully_shard of the root module), or give the others to an optimizer of torch"
        )
    first = sharded[0]
    assert first.shard is not None
    other = next((slot for slot in sharded if slot.shard is not None and slot.shard.mesh != first.shard.mesh), None)
    if other is not None:
        raise ValueError(f"parameters '{first.name}' and '{other.name}' are on different meshes: one run has one")
    return Ranks.along(first.shard.mesh, first.shard.dimension)


def copies_of(slots: Sequence[Slot]) -> Copies | None:
    """The processes that have the same shards (HSDP); None where there is one alone."""
    shard = next((slot.shard for slot in slots if slot.shard is not None), None)
    if shard is None:
        return None
    return None if shard.copies is None else Copies(shard.mesh.get_group(shard.copies))
