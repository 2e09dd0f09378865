"""Processes with the same weights and the same gradients (DDP): each sends its part of every gradient, and all have all weights."""

from __future__ import annotations

import gc
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from .ranks import Ranks
from .slots import Part, Slot

# Tensors of fewer elements belong to one rank each: a frame of a few bytes costs as much as one of some thousands.
_CUT_ELEMENTS = 1 << 14
# Cuts lie at multiples of so many elements, which are whole cache lines in any dtype.
_ALIGNMENT = 64
MEETING_SECONDS = 120
# Elements that are gathered at a time: all of a large model would be a second copy of it.
_TOGETHER = 1 << 26


class Parts(Ranks):
    """All processes of a process group. Every method is a collective but ``cut``: all of them call it, in the same order."""

    def __init__(self, group: Any, device: torch.device) -> None:
        """``device`` has the parameters."""
        import torch.distributed as dist

        super().__init__(group, dist.get_rank(group), dist.get_world_size(group), device)

    def cut(self, slots: Sequence[Slot]) -> list[Slot]:
        """The slots with this rank's parts of them. The parts of all ranks are of like size, and the same wherever this is called."""
        loads = [0] * self.world_size
        found: list[Slot] = []
        for slot in slots:
            size = slot.tensor.numel()
            if size >= _CUT_ELEMENTS and slot.tensor.is_contiguous():
                inner = [size * i // self.world_size // _ALIGNMENT * _ALIGNMENT for i in range(1, self.world_size)]
                bounds = [0, *inner, size]
            else:
                owner = loads.index(min(loads))
                bounds = [0] * (owner + 1) + [size] * (self.world_size - owner)
            loads = [load + bounds[i + 1] - bounds[i] for i, load in enumerate(loads)]
            part = Part(tuple(bounds), self.rank)
            declaration = replace(slot.declaration, ranges=[part.range] if part.size(self.rank) else [])
            found.append(replace(slot, part=part, declaration=declaration))
        return found

    def share(self, slots: Sequence[Slot]) -> None:
        """Gives every rank the weights of all, each from the rank that has applied its update."""
        import torch.distributed as dist

        for bucket in _buckets(slots):
            sizes = [sum(part.size(rank) for _, part in bucket) for rank in range(self.world_size)]
            room = max(sizes)
            like = bucket[0][0].tensor.detach()
            sent, gathered = like.new_empty(room), like.new_empty(self.world_size * room)
            own = [slot.local.detach().reshape(-1) for slot, _ in bucket]
            torch.cat(own, out=sent[: sizes[self.rank]])
            dist.all_gather_into_tensor(gathered, sent, group=self._group)
            for rank in range(self.world_size):
                if rank != self.rank:  # pragma: no cover - in processes of several ranks, which are not measured
                    places = [part.of(slot.tensor.detach(), rank) for slot, part in bucket]
                    flat = gathered[rank * room : rank * room + sizes[rank]]
                    given = torch.split_with_sizes(flat, [place.numel() for place in places])
                    torch._foreach_copy_(places, [one.view(p.shape) for one, p in zip(given, places, strict=True)])


def _buckets(slots: Sequence[Slot]) -> Iterator[list[tuple[Slot, Part]]]:
    """Slots of one dtype and device, about as many elements of them as are gathered at a time."""
    alike: defaultdict[tuple[torch.dtype, torch.device], list[tuple[Slot, Part]]] = defaultdict(list)
    for slot in slots:
        assert slot.part is not None, "the slots were cut"
        bucket = alike[slot.tensor.dtype, slot.tensor.device]
        bucket.append((slot, slot.part))
        if (
            sum(one.tensor.numel() for one, _ in bucket) >= _TOGETHER
        ):  # pragma: no cover - a model of 64 million weights
            yield list(bucket)
            bucket.clear()
    yield from (bucket for bucket in alike.values() if bucket)


def are_alike(group: Any, slots: Sequence[Slot]) -> bool:
    """Whether the optimizers of all processes have the same parameters: of a sharded one (ZeRO) each has others. A collective.

    Raises RuntimeError for processes that do not come: they may have no optimizer.
    """
    import torch.distributed as dist

    _meet(group)
    mine = [(slot.name, slot.shape, slot.declaration.group) for slot in slots]
    of_all: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_all, mine, group=group)
    return all(one == mine for one in of_all)


_meetings = itertools.count()


def _meet(group: Any) -> None:
    """Waits for all processes of a group, for a while: a collective that some do not take part in would wait for half an hour."""
    import torch.distributed as dist

    store, meeting = dist.distributed_c10d._get_default_store(), next(_meetings)
    key = f"muond/{dist.get_process_group_ranks(group)}/{meeting}"
    store.set(f"{key}/{dist.get_rank(group)}", "here")
    missing: list[int] = []
    for rank in range(dist.get_world_size(group)):
        try:
            store.wait([f"{key}/{rank}"], timedelta(seconds=MEETING_SECONDS if not missing else 1))
        except RuntimeError:
            missing.append(rank)
    if missing:
        raise RuntimeError(
            f"the parameters are those of a DistributedDataParallel, whose ranks {missing} have taken no step of an optimizer of muond "
            f"within {MEETING_SECONDS} s: make one on every rank, or give process_group=False where this rank alone has it"
        )


def group_of_ddp(parameters: Sequence[torch.Tensor]) -> Any | None:
    """The process group of the DistributedDataParallel that has these parameters; None where there is none, or one process.

    The parameters do not know their wrapper, so that is looked for among all objects, until the run is open.
    """
    # Importing torch.distributed takes a second, and nobody has a wrapper without it.
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    from torch.nn.parallel import DistributedDataParallel

    wanted = {id(parameter) for parameter in parameters}
    for one in gc.get_objects():
        # Not isinstance: it asks the object itself, and there are some that answer by importing half a library.
        if issubclass(type(one), DistributedDataParallel) and wanted <= {id(p) for p in one.parameters()}:
            return one.process_group
    return None
