"""Where a run stands, held against where it is expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...error import ErrorFields, MuondError
from ...run import Run


@dataclass(frozen=True)
class Followed:
    """Where the run is that another process has, whose weights this one has as well."""

    name: str
    step_count: int
    digest: str
    url: str
    """The process that the run was opened at."""
    is_whole: bool = False
    """Whether the run has several shards."""


def is_at(run: Run, step: object, digest: object) -> bool:
    """Whether the run stands at this step of this history, with nothing of the next one applied."""
    return run.step_count == step and run.digest == digest and not run.ahead


def require_place(run: Run | Followed, found: Mapping[str, Any]) -> None:
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


def require_digest(run: str, checkpoint: str, found: str, expected: str) -> None:
    """Raises MuondError STEP_CONFLICT for a checkpoint of the same id from another history."""
    if found == expected:
        return
    message = (
        f"checkpoint '{checkpoint}' of run '{run}' has digest {found}, expected {expected}: it is of another history"
    )
    raise MuondError("STEP_CONFLICT", message)


def place_of(run: Run) -> Followed:  # pragma: no cover - in processes of several copies, which are not measured
    """Where a run is, for the processes that follow."""
    return Followed(run.name, run.step_count, run.digest, run.address.url, run.is_whole)
