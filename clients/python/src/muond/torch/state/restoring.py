"""Bringing a run to where a state_dict or a kept checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ...error import MuondError
from ...run import Run
from .kept import Kept, Shelf
from .place import is_at, require_digest

_UNREADABLE = "CHECKPOINT_UNREADABLE"


def open_at(open_run: Callable[[str, str | None], Run], token: Mapping[str, Any]) -> Run:
    """Opens the run of a state_dict whose state is a checkpoint, and goes to that. Raises MuondError.

    ``open_run(mode, checkpoint)`` opens it.
    """
    try:
        # A run that does not exist has no checkpoint: it must not be made.
        run = open_run("resume", None)
    except MuondError as error:
        # It goes on from its newest checkpoint; this one may be an older one.
        if error.code != _UNREADABLE:
            raise
        run = open_run("resume", token["checkpoint"])
    try:
        go_to(run, token)
    except BaseException:
        run.close()
        raise
    return run


def go_to(run: Run, token: Mapping[str, Any]) -> None:
    """Brings an open run to the checkpoint of a state_dict. Raises MuondError; the run is where it was then."""
    if is_at(run, token["step"], token["digest"]) and not run.in_flight:
        return
    checkpoint = token["checkpoint"]
    if not run.is_whole:
        # The id of a checkpoint says its step; another history has others of the same id. That of a whole is no other's.
        with run.rest() as rest:
            require_digest(run.name, checkpoint, rest.checkpoint(run.name, checkpoint)["digest"], token["digest"])
    try:
        run.reopen(checkpoint)
    except MuondError:
        with suppress(MuondError):
            run.reopen()
        raise


def go_back(run: Run, shelf: Shelf) -> Kept:
    """Goes to the newest checkpoint that both sides still have; what is newer leaves the shelf. Raises MuondError."""
    if not shelf.kept:
        message = f"run '{run.name}' has no weights kept here: checkpoint() keeps them with keep='cpu'"
        raise MuondError("STEP_CONFLICT", message)
    known = True
    try:
        run.reopen()
    except MuondError as error:
        # Its newest checkpoint may be one that is not kept here.
        if error.code != _UNREADABLE:
            raise
        known = False
    while True:
        kept = shelf.kept[-1]
        try:
            if not (known and is_at(run, kept.checkpoint.step, kept.checkpoint.digest)):
                run.reopen(kept.checkpoint.id)
                require_digest(run.name, kept.checkpoint.id, run.digest, kept.checkpoint.digest)
        except MuondError as error:
            # The service may have lost the newest one and have an older one still.
            if error.retryable or len(shelf.kept) == 1:
                raise
            known = False
            shelf.kept.pop()
        else:
            return kept
