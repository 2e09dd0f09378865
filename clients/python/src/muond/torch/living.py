"""The runs that optimizers of this process have open, and those that go when their optimizer does."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Any

from ..error import MuondError
from ..run import Run
from ..transport.address import Addresses

_owners: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()


def lives(addresses: Addresses, run: str) -> bool:
    """Whether an optimizer of this process has the run open: its state is copied, never taken from it."""
    return (addresses.first.authority, run) in _owners


def begins(owner: object, addresses: Addresses, run: str) -> None:
    _owners[addresses.first.authority, run] = owner


def ends(addresses: Addresses, run: str) -> None:
    _owners.pop((addresses.first.authority, run), None)


def go_with(owner: object, run: Run) -> weakref.finalize[..., Any]:
    """Has a run go with its owner unless a data folder keeps it: else a sweep would leave one for each trial."""
    return weakref.finalize(owner, _delete_unkept, os.getpid(), run)


def _delete_unkept(process: int, run: Run) -> None:
    if os.getpid() != process:  # pragma: no cover - in a forked child, which is not measured
        return
    run.close()
    # The service may be gone, and nobody waits for this.
    with suppress(MuondError), run.rest(patient=False) as rest:
        if not rest.has_checkpoints(run.name):
            rest.delete(run.name)
