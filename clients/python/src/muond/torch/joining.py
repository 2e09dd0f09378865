"""Which processes have a run together: the parameters, their wrapper or ``process_group`` say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..wire.dtype import BLOCKS
from .copies import Copies
from .parts import Parts, are_alike, group_of_ddp
from .ranks import Ranks, copies_of, ranks_of
from .settings import Settings
from .slots import Slot


def others_of(slots: Sequence[Slot], given: Settings) -> tuple[Ranks | None, Copies | None]:
    """The members of the run, and the processes that are given the weights of one; None for a process that is alone.

    Raises ValueError for what they cannot have together.
    """
    ranks, group = ranks_of(slots), given.process_group
    if group is None or group is False:
        copies = copies_of(slots)
        if ranks is not None:
            _check_shared(given, slots)
        if copies is not None:
            _check_copied(given)
        return ranks, copies
    if ranks is not None:
        raise ValueError("process_group is of whole models with the same gradients (DDP): the parameters are sharded")
    if _is_first_alone(given, slots):
        _check_copied(given)
        return None, Copies(group)
    _check_copied(given, measures=True)
    return Parts(group, slots[0].tensor.device), None


def wrapped_with(
    parameters: Sequence[torch.Tensor], slots: Callable[[], Sequence[Slot]], given: Settings
) -> Parts | None:
    """The processes whose DistributedDataParallel has these parameters. None where there is none, or the options are for a run of
    each process's own. A collective of those processes."""
    group = None if given.process_group is False else group_of_ddp(parameters)
    if group is None:
        return None
    return _parts_of(group, slots(), given)  # pragma: no cover - in processes of several ranks, which are not measured


def _parts_of(
    group: Any, declared: Sequence[Slot], given: Settings
) -> Parts | None:  # pragma: no cover - in processes of several ranks, which are not measured
    if not are_alike(group, declared) or not declared:
        return None
    if any(_not_copied(given).values()) or _is_first_alone(given, declared):
        return None
    return Parts(group, declared[0].tensor.device)


def _check_shared(given: Settings, slots: Sequence[Slot]) -> None:
    """Raises ValueError for options that ranks with shards cannot have."""
    in_blocks = any(slot.declaration.gradient_dtype in BLOCKS for slot in slots)
    refused = {
        "error_feedback=True": (
            given.error_feedback and in_blocks,
            "what a shard has lost is in no state_dict; with gradients in blocks use error_feedback=False",
        ),
        "overlap=True": (given.overlap, "FSDP2 gives its gradients after the backward pass"),
        f"keep={given.keep!r}": (
            given.keep is not None,
            "use checkpoint() of the service and torch.distributed.checkpoint",
        ),
    }
    for option, (is_given, why) in refused.items():
        if is_given:
            raise ValueError(f"{option} is not possible with sharded parameters: {why}")


def _not_copied(given: Settings) -> dict[str, bool]:
    """Options that processes with the same weights cannot have, and whether they are given."""
    return {
        "overlap=True": given.overlap,
        f"keep={given.keep!r}": given.keep is not None,
        "state='checkpoint'": given.state == "checkpoint",
    }


def _check_copied(given: Settings, *, measures: bool = False) -> None:
    """Raises ValueError for options that processes with the same weights cannot have.

    ``measures``: what each of them measures goes into the run.
    """
    refused = {**_not_copied(given), "max_logits": given.max_logits is not None and not measures}
    for option, is_given in refused.items():
        if is_given:
            raise ValueError(f"{option} is not possible where several processes have the same weights in one run")


def _is_first_alone(given: Settings, slots: Sequence[Slot]) -> bool:
    """Whether one process sends all: what error feedback has lost of a gradient is in the state_dict of one process."""
    return given.error_feedback and any(slot.declaration.gradient_dtype in BLOCKS for slot in slots)
