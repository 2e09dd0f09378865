"""Bringing a run to where a state_dict or a kept checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..error import MuondError
from ..receipt import Checkpoint
from ..rest import Rest
from ..run import Run
from .kept import Kept
from .slots import Slot
from .state import write_state


def is_at(run: Run, step: object, digest: object) -> bool:
    """Whether the run stands at this step of this history, with nothing of the next one applied."""
    return run.step_count == step and run.digest == digest and not run.ahead


def bring_to(  # pragma: no cover - until the service imports states and has checkpoints
    run: Run,
    token: Mapping[str, Any],
    state: Mapping[int, Mapping[str, Any]],
    slots: Sequence[Slot],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Back to the checkpoint that the state_dict names, or to its tensors. Raises MuondError; the run is closed then."""
    try:
        if "checkpoint" in token:
            return run.reopen(token["checkpoint"])
        run.release()
        with Rest(run.address) as rest:
            write_state(rest, run.name, slots, state, groups)
        return run.reopen()
    except MuondError as error:
        run.close()
        message = (
            f"run '{run.name}' is at step {run.step_count} in the service, the state_dict at step {token.get('step', 0)}, "
            f"and the service did not go there: {error.message}"
        )
        raise MuondError(error.code, message, error.fields, status=error.status, retryable=error.retryable) from error


def go_back(run: Run, kept: list[Kept]) -> Kept:  # pragma: no cover - until the service has checkpoints
    """Goes to the newest checkpoint that both sides still have; older ones than that stay in ``kept``. Raises MuondError."""
    if not kept:
        message = f"run '{run.name}' has no weights kept here: checkpoint() keeps them with keep='cpu'"
        raise MuondError("STEP_CONFLICT", message)
    run.reopen()
    while True:
        try:
            _go_to(run, kept[-1].checkpoint)
        except MuondError as error:
            # The service may have lost the newest one and have an older one still.
            if error.retryable or len(kept) == 1:
                raise
            kept.pop()
        else:
            return kept[-1]


def _go_to(run: Run, checkpoint: Checkpoint) -> None:  # pragma: no cover - until the service has checkpoints
    if not is_at(run, checkpoint.step, checkpoint.digest):
        run.reopen(checkpoint.id)
