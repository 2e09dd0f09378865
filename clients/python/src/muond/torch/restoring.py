"""Bringing a run to where a state_dict or a kept checkpoint is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..error import ErrorFields, MuondError
from ..rest import Rest
from ..run import Run
from .kept import Kept, Shelf
from .slots import Slot
from .state import write_state

_UNREADABLE = "CHECKPOINT_UNREADABLE"


def is_at(run: Run, step: object, digest: object) -> bool:
    """Whether the run stands at this step of this history, with nothing of the next one applied."""
    return run.step_count == step and run.digest == digest and not run.ahead


def open_at(open_run: Callable[[str, str | None], Run], token: Mapping[str, Any]) -> Run:
    """Opens the run of a state_dict whose state is a checkpoint, and goes to that. Raises MuondError.

    ``open_run(mode, checkpoint)`` opens it.
    """
    checkpoint = token["checkpoint"]
    try:
        # A run that does not exist has no checkpoint: it must not be made.
        run = open_run("resume", None)
    except MuondError as error:
        # It goes on from its newest checkpoint; this one may be an older one.
        if error.code != _UNREADABLE:
            raise
        run = open_run("resume", checkpoint)
    try:
        if not is_at(run, token["step"], token["digest"]):
            run.reopen(checkpoint)
        _require_digest(run, checkpoint, token["digest"])
    except BaseException:
        run.close()
        raise
    return run


def import_into(
    run: Run,
    rest: Rest,
    token: Mapping[str, Any],
    state: Mapping[int, Mapping[str, Any]],
    slots: Sequence[Slot],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Gives the service the tensors of a state_dict. Raises MuondError; the run is closed then."""
    there = run.step_count
    try:
        run.release()
        with rest:
            # Without a token it is of torch's own optimizer.
            write_state(rest, run.name, slots, state, groups, None if token else "ema")
        return run.reopen()
    except MuondError as error:
        run.close()
        message = (
            f"run '{run.name}' is at step {there} in the service, the state_dict at step {token.get('step', 0)}, "
            f"and the service did not go there: {error.message}"
        )
        raise MuondError(error.code, message, error.fields, status=error.status, retryable=error.retryable) from error


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
                _require_digest(run, kept.checkpoint.id, kept.checkpoint.digest)
        except MuondError as error:
            # The service may have lost the newest one and have an older one still.
            if error.retryable or len(shelf.kept) == 1:
                raise
            known = False
            shelf.kept.pop()
        else:
            return kept


def require_place(run: Run, found: Mapping[str, Any]) -> None:
    """Raises MuondError STEP_CONFLICT unless what the service says of the run is where this client has left it."""
    step, digest, ahead = found["step"], found["digest"], found["ahead"]
    if (step, digest, ahead) == (run.step_count, run.digest, []):
        return
    begun = f", with step {step + 1} begun" if ahead else ""
    message = (
        f"run '{run.name}' is at step {step} with digest {digest} in the service{begun}, this client at step "
        f"{run.step_count} with digest {run.digest}: its state is not that of the weights here"
    )
    raise MuondError("STEP_CONFLICT", message, ErrorFields(expected_step=step + 1))


def _require_digest(run: Run, checkpoint: str, digest: str) -> None:
    """The id of a checkpoint says its step; another history has others of the same id."""
    if run.digest == digest:
        return
    message = f"checkpoint '{checkpoint}' of run '{run.name}' has digest {run.digest}, expected {digest}: it is of another history"
    raise MuondError("STEP_CONFLICT", message, ErrorFields(step=run.step_count))
