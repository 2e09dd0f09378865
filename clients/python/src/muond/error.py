"""Everything the client raises about a run, with the service's own codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Whether the same request may succeed later, for what the client itself finds. An error frame says it for itself.
_RETRYABLE = {
    *(
        "CONNECTION_LOST",
        "RUN_BUSY",
        "OVERLOADED",
        "DRAINING",
        "RESTORING",
        "DEVICE_FAILED",
        "STORAGE_FAILED",
        "COORDINATOR_FAILED",
        "QUORUM_LOST",
        "PEER_FAILED",
    ),
}


@dataclass(frozen=True)
class ErrorFields:
    """What an error is about, where it applies."""

    parameter: int | None = None
    """Index of the parameter."""
    step: int | None = None
    expected_step: int | None = None
    """The step that the service would take next."""
    retry_after_seconds: float | None = None
    left_out: bool = False
    """Whether the step was closed without this replica, and what it has missed follows."""
    refused: Sequence[str] = ()
    """Names of every parameter whose gradient was refused in this step."""


class MuondError(Exception):
    """An error of the service or of the way there.

    ``code`` is one of the codes in docs/protocol.md ("Errors"), or CONNECTION_LOST (it could not be made or was lost, and
    every retry was used up), TAKEN_OVER (another client opened the run with ``takeover``) or CLIENT_CLOSED.
    """

    code: str
    status: int | None
    """The HTTP status of the same error, where it has one."""
    retryable: bool
    fields: ErrorFields

    def __init__(
        self,
        code: str,
        message: str,
        fields: ErrorFields | None = None,
        *,
        status: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code
        self.message = message
        self.fields = fields or ErrorFields()
        self.status = status
        self.retryable = code in _RETRYABLE if retryable is None else retryable

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries (DataLoader, torch.multiprocessing); the default would call __init__ with one argument.
        return _restore, (self.code, self.message, self.fields, self.status, self.retryable)


def _restore(code: str, message: str, fields: ErrorFields, status: int | None, retryable: bool) -> MuondError:
    return MuondError(code, message, fields, status=status, retryable=retryable)


def malformed(message: str) -> MuondError:
    return MuondError("FRAME_MALFORMED", message)
