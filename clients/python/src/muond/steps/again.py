"""Opening a run again: what is said, and whether it is where this client has left it."""

from __future__ import annotations

from ..error import ErrorFields, MuondError
from ..wire.frame import Frame

# Of the first `open` alone: the run remembers its schedule, would go back to a checkpoint again, and the weights have moved.
_ONCE = ("groups", "checkpoint", "from", "weights")


def resuming(frame: Frame) -> Frame:
    """What opens the run of an ``open`` frame again, whoever still holds it."""
    kept = {key: value for key, value in frame.items() if key not in _ONCE}
    return {**kept, "mode": "resume", "takeover": True}


def require_same_history(opened: Frame, number: int | None, known_step: int, known_digest: str) -> None:
    """Raises MuondError STEP_CONFLICT for a run that is not where this client has left it.

    ``number`` is the step in flight: the service may have finished it, and the receipt was lost.
    """
    run, step, digest = opened["run"], opened["step"], opened["digest"]
    if step == number or (step == known_step and digest == known_digest):
        return
    if step == known_step:
        there, here = f"has digest {digest} at step {step}", f"has {known_digest}"
        advice = "open it again with weights of that history"
    else:
        there, here = f"resumed at step {step}", f"is at step {known_step}"
        advice = f"go back to your weights of step {step} and open it again"
    message = f"run '{run}' {there}, this client {here}: {advice}"
    raise MuondError("STEP_CONFLICT", message, ErrorFields(step=number, expected_step=step + 1))
