"""The run's one writer as the service sees it: keeps the run open over as many connections as it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from ..connection import Connection, Listener
from ..error import ErrorFields, MuondError
from ..rest import Rest
from ..transport.address import Endpoint
from ..transport.arenas import Arenas
from ..transport.choice import Transport
from ..wire.frame import Frame, MemberKey, frame_error, members_of
from .attempts import Attempts
from .backoff import Backoff
from .exchange import Exchange, How, Taken
from .step import Step
from .updates import Updates

T = TypeVar("T")

RETRIES = 8
# The service has this long to answer an `open` or a `checkpoint`: both may have to write or read a model's state.
ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Host:
    """What a run needs to know of its service."""

    endpoint: Endpoint
    retries: int = RETRIES
    """Consecutive failed attempts at one step that brought no new update, before it is given up."""
    backoff: Backoff = field(default_factory=Backoff)
    chunk_bytes: int = 1 << 24
    """Most bytes of a gradient in one message; the service's own limit holds too."""
    transport: Transport = field(default_factory=Transport)
    """Memory to share with it."""


@dataclass(frozen=True)
class Failed:
    """Why a step was given up."""

    error: BaseException


class Writer:
    """Steps are taken in a thread of its own, one at a time. Nothing here refers to the run, so a forgotten run is let go."""

    def __init__(self, host: Host, frame: Frame) -> None:
        """Opens the run. A first `open` is not retried: a wrong address, key or run should be heard of at once."""
        self._host = host
        self._frame = frame
        self._connection, self.opened = self._handshake(frame)
        self.step: int = self.opened["step"]
        """The last finished step."""
        self.digest: str = self.opened["digest"]
        self._stop = threading.Event()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._patient = True
        self._thread = threading.Thread(target=self._work, name="muond writer", daemon=True)
        self._thread.start()

    def take(self, step: Step, updates: Updates, settle: Callable[[Taken | Failed], None]) -> None:
        """Takes a step, again and again over new connections as long as the trouble is worth a retry; then ``settle`` is called."""
        self._patient = True

        def attempt() -> Taken:
            if self._connection.reason is not None:
                self._reopen(step.number)
            chunk_bytes = min(self.opened["limits"]["chunk_bytes"], self._host.chunk_bytes)
            averages = self.opened.get("member", {}).get("replicas", 1) > 1
            how = How(chunk_bytes, self.arenas, averages, self._host.retries)
            taken = Exchange(self._connection, step, updates, how).run()
            self.step, self.digest = taken.receipt["step"], taken.receipt["digest"]
            return taken

        def job() -> None:
            try:
                settle(self._retrying(attempt, updates))
            except BaseException as error:  # noqa: BLE001 - the thread goes on; the trainer gets the error
                self._connection.fail(error)
                updates.forget()
                settle(Failed(error))

        self._jobs.put(job)

    def checkpoint(self, tag: str | None) -> Frame:
        """Has the service keep the state of this step; returns its `checkpointed`. Not while a step is in flight.

        Asked again it is the same checkpoint, so it is tried again as a step is.
        """

        def attempt() -> Frame:
            if self._connection.reason is not None:
                self._reopen(None)
            answer = _ask(
                self._connection, {"type": "checkpoint", **({} if tag is None else {"tag": tag})}, "checkpointed"
            )
            if answer["step"] != self.step:
                raise MuondError(
                    "FRAME_UNEXPECTED", f"the service kept step {answer['step']}, this client is at {self.step}"
                )
            return answer

        return self._outlast(attempt)

    def rest(self) -> Rest:
        """The service's other interface, as patient as this one."""
        return Rest(self._host.endpoint, self._host.retries, self._host.backoff)

    def moved(self, step: int, digest: str) -> None:
        """State was imported into the run: a step is taken from there."""
        self.step, self.digest = step, digest

    def reopen(self, checkpoint: str | None = None) -> None:
        """Opens the run again wherever it is now, or at a checkpoint. Not while a step is in flight. Tried again as a step is."""
        self._connection.close(MuondError("CLIENT_CLOSED", "the run is opened again"))
        frame: Frame = {**self._resuming(), **({} if checkpoint is None else {"checkpoint": checkpoint})}
        self._connection, self.opened = self._outlast(lambda: self._handshake(frame, self.step))
        self.step, self.digest = self.opened["step"], self.opened["digest"]

    def release(self) -> None:
        """Ends the connection in order, and leaves the run to whoever opens it next; `reopen` takes it up again."""
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was released"))

    def hurry(self) -> None:
        """The step in flight is not tried again: someone waits who wants to leave."""
        self._patient = False

    def close(self) -> None:
        """Ends the connection and the thread; a step in flight fails with CLIENT_CLOSED."""
        self._stop.set()
        self._jobs.put(None)
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was closed"))
        self._host.transport.close()

    @property
    def members(self) -> dict[MemberKey, bool]:
        """{member: whether it has a connection}, as the newest frames tell."""
        return {**members_of(self.opened), **self._connection.members}

    @property
    def arenas(self) -> Arenas | None:
        """The memory that the connection shares with the service; None where everything goes over its socket."""
        return self._host.transport.taken

    def _handshake(self, frame: Frame, known_step: int | None = None) -> tuple[Connection, Frame]:
        return self._host.transport.agree(
            lambda offers: _handshake(self._host.endpoint, {**frame, **offers}, known_step)
        )

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _outlast(self, attempt: Callable[[], T]) -> T:
        """In the caller's thread; raises what was not worth another attempt."""
        self._patient = True
        outcome = self._retrying(attempt)
        if isinstance(outcome, Failed):
            raise outcome.error
        return outcome

    def _retrying(self, attempt: Callable[[], T], updates: Updates | None = None) -> T | Failed:
        attempts = Attempts(self._host.retries, self._host.backoff)
        while True:
            before = 0 if updates is None else updates.delivered
            try:
                return attempt()
            except MuondError as error:
                self._connection.fail(error)
                if updates is not None:
                    updates.forget()
                progress = updates is not None and updates.delivered > before
                wait = attempts.wait_after(error, progress=progress) if self._patient else None
                if wait is None:
                    return Failed(error)
            if self._stop.wait(wait):
                return Failed(MuondError("CLIENT_CLOSED", "the run was closed"))

    def _resuming(self) -> Frame:
        kept = {key: value for key, value in self._frame.items() if key not in _ONCE}
        return {**kept, "mode": "resume", "takeover": True}

    def _reopen(self, number: int | None) -> None:
        reason = self._connection.reason
        if isinstance(reason, MuondError) and reason.code in ("TAKEN_OVER", "CLIENT_CLOSED"):
            # A run taken by another client is not taken back: the two would go on for ever.
            raise reason
        connection, opened = self._handshake(self._resuming(), self.step)
        self._connection = connection
        self._require_same_history(opened, number)
        self.opened = opened

    def _require_same_history(self, opened: Frame, number: int | None) -> None:
        """The service may have finished the step whose receipt was lost; anything else is not where this client left the run."""
        run, step, digest = opened["run"], opened["step"], opened["digest"]
        if step == number or (step == self.step and digest == self.digest):
            return
        if step == self.step:
            there, here = f"has digest {digest} at step {step}", f"has {self.digest}"
            advice = "open it again with weights of that history"
        else:
            there, here = f"resumed at step {step}", f"is at step {self.step}"
            advice = f"go back to your weights of step {step} and open it again"
        message = f"run '{run}' {there}, this client {here}: {advice}"
        raise MuondError("STEP_CONFLICT", message, ErrorFields(step=number, expected_step=step + 1))


# Of the first `open` alone: the run remembers its schedule, would go back to a checkpoint again, and the weights have moved.
_ONCE = ("groups", "checkpoint", "from", "weights")


class _Answer(Listener):
    """Waits for one frame of one type."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._done = threading.Event()
        self._answer: Frame | None = None
        self._error: BaseException | None = None

    def wait(self, question: str) -> Frame:
        if not self._done.wait(ANSWER_SECONDS):
            raise MuondError("CONNECTION_LOST", f"no answer to {question} within {ANSWER_SECONDS:.0f} s")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def frame(self, frame: Frame) -> None:
        if self._done.is_set():
            super().frame(frame)
        elif frame["type"] == self._kind:
            self._answer = frame
            self._done.set()
        elif frame["type"] == "error":
            self._error = frame_error(frame)
            self._done.set()
        else:
            super().frame(frame)

    def closed(self, reason: BaseException) -> None:
        if not self._done.is_set():
            self._error = reason
            self._done.set()


def _ask(connection: Connection, frame: Frame, kind: str) -> Frame:
    """Sends a frame and waits for its answer. On an error the connection is ended, and the error raised."""
    listener = _Answer(kind)
    try:
        connection.listen(listener)
        connection.send(frame)
        answer = listener.wait(frame["type"])
    except BaseException as error:
        connection.fail(error)
        raise
    connection.listen()
    return answer


def _handshake(endpoint: Endpoint, frame: Frame, known_step: int | None = None) -> tuple[Connection, Frame]:
    connection = Connection(endpoint)
    try:
        return connection, _ask(connection, frame, "opened")
    except MuondError as error:
        if error.code != "RUN_NOT_FOUND" or known_step is None:
            raise
        message = f"{error.message}; it was at step {known_step} here: was the service restarted without durable state?"
        raise MuondError(error.code, message, error.fields, status=error.status, retryable=False) from error
