"""Opening the run of an optimizer."""

from __future__ import annotations

import gc
import hashlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..declaration import Member, Quorum
from ..error import MuondError
from ..run import Run, open_run
from ..steps.updates import Update
from ..transport.address import Addresses
from .apply import Views, apply_updates
from .gpu_arenas import arenas_of
from .ranks import Ranks
from .settings import Settings
from .slots import Slot, attention_declarations, group_declarations
from .staging import allocator, memory_of

_ADVICE = {
    "RUN_EXISTS": "give it another name, load a state_dict of it, or go on with mode='resume'",
    "RUN_MISMATCH": "was this run made by another model? Give this one another name",
    "RUN_BUSY": "another trainer is connected; takeover=True takes the run from it",
    "RUN_NOT_FOUND": "this service has no such run: connect to the one that has (url=), or load a state_dict with state='tensors', "
    "which goes anywhere",
    "OVER_CAPACITY": "close(delete=True) frees what an optimizer's run holds",
}


@dataclass(frozen=True)
class Replica:
    """One of several replicas of a run, each of which has the whole model; ``quorum`` is the same for all."""

    replica: int
    replicas: int
    quorum: Quorum | None


def _member(ranks: Ranks | None, replica: Replica | None) -> Member | None:
    if replica is not None:
        return Member(0, 1, replica.replica, replica.replicas)
    return None if ranks is None else Member(ranks.rank, ranks.world_size)


def open_slots(
    run: str,
    slots: list[Slot],
    groups: Sequence[Mapping[str, Any]],
    addresses: Addresses,
    given: Settings,
    *,
    mode: str,
    checkpoint: str | None = None,
    branch_of: tuple[str, str] | None = None,
    ranks: Ranks | None = None,
    replica: Replica | None = None,
) -> Run:
    """Opens a run whose updates are applied to the slots' tensors, as a member of it where there are ``ranks`` or it is a ``replica``.

    Raises MuondError, with what a trainer can do about it.
    """

    views = Views()

    def apply(updates: Sequence[Update]) -> None:
        apply_updates(slots, updates, views)

    def open_it() -> Run:
        return open_run(
            [endpoint.url for endpoint in addresses.endpoints],
            run=run,
            mode=mode,
            groups=group_declarations(groups),
            parameters=[slot.declaration for slot in slots],
            attentions=attention_declarations(given.attentions, slots) or None,
            member=_member(ranks, replica),
            quorum=None if replica is None else replica.quorum,
            # One that takes its place again has older weights, and takes those of the others first.
            weights=None if replica is None or given.takeover else _digest_of(slots),
            takeover=given.takeover,
            checkpoint=checkpoint,
            branch_of=branch_of,
            client=f"muond.torch, torch {torch.__version__}",
            token=addresses.first.token,
            headers=given.headers,
            ssl_context=given.ssl_context,
            retries=given.retries,
            backoff=given.backoff,
            chunk_bytes=given.chunk_bytes,
            shards=given.shards,
            transport=given.transport,
            gpu_arenas=None if ranks is not None or replica is not None else arenas_of(slots),
            apply=apply,
            allocate=allocator(slots),
        )

    try:
        return _with_room(open_it)
    except MuondError as error:
        advice = _ADVICE.get(error.code)
        # What replicas have different the service says, and what to do.
        if advice is None or (replica is not None and error.code == "RUN_MISMATCH"):
            raise
        message = f"{error.message} ({advice})"
        raise MuondError(error.code, message, error.fields, status=error.status, retryable=error.retryable) from error


def _digest_of(slots: Sequence[Slot]) -> str:
    """SHA-256 of the weights, parameter after parameter."""
    digest = hashlib.sha256()
    for slot in slots:
        digest.update(memory_of(slot.local.detach().cpu().contiguous()))
    return digest.hexdigest()


def _with_room(open_it: Callable[[], Run]) -> Run:
    """Opens a run; a service that is full is asked again once the optimizers are gone that only a cycle still holds."""
    try:
        return open_it()
    except MuondError as error:
        if error.code != "OVER_CAPACITY":
            raise
    # The error of a trial that failed holds its frame, and that its optimizer: their runs go with them.
    gc.collect()
    return open_it()


def new_run_name() -> str:
    """The script's name, the time and six random digits: a name that no run has."""
    script = Path(sys.argv[0]).stem if sys.argv else ""
    plain = "".join(character if character.isascii() and character.isalnum() else "-" for character in script)
    return f"{plain.strip('-')[:60] or 'python'}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
