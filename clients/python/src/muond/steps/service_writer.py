"""The writer of a run that one service has: keeps the run open over as many connections as it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

from ..connection import Connection
from ..error import ErrorFields, MuondError
from ..rest import Rest, Tensor
from ..transport.address import Endpoint
from ..transport.arenas import Arenas
from ..transport.choice import Transport
from ..wire.frame import Frame, MemberKey, members_of
from .asking import ask, enter, lost_state
from .attempts import Attempts
from .exchange import Exchange, How, Taken
from .parameter import Bound
from .step import Step
from .updates import Memory, Update, Updates
from .writer import Failed, Host

T = TypeVar("T")


class ServiceWriter:
    """Steps are taken in a thread of its own, one at a time."""

    def __init__(self, host: Host, frame: Frame, transport: Transport, connection: Connection, opened: Frame) -> None:
        """``opened`` is what ``connection`` was answered to the ``frame``, with what ``transport`` offers."""
        self._host = host
        self._frame = frame
        self._transport = transport
        self._connection, self.opened = connection, opened
        self._addresses = host.addresses.led_by(connection.endpoint)
        self.step: int = self.opened["step"]
        self.digest: str = self.opened["digest"]
        self._updates: Updates
        self._stop = threading.Event()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._patient = True
        self._thread = threading.Thread(target=self._work, name="muond writer", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Endpoint:
        return self._addresses.first

    def deliver_to(self, parameters: Sequence[Bound], memory: Memory, deliver: Callable[[Update], None]) -> None:
        self._updates = Updates(parameters, self.step + 1, memory, deliver)

    def expect(self, step: int) -> None:
        self._updates.next(step)

    def take(self, step: Step, settle: Callable[[Taken | Failed], None]) -> None:
        self._patient = True
        updates = self._updates

        def attempt() -> Taken:
            if self._connection.reason is not None:
                self._reopen(step.number)
            chunk_bytes = min(self.opened["limits"]["chunk_bytes"], self._host.chunk_bytes)
            averages = self.opened.get("member", {}).get("replicas", 1) > 1
            how = How(chunk_bytes, self._transport.taken, averages, self._host.retries)
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
        # Asked again it is the same checkpoint, so it is tried again as a step is.
        def attempt() -> Frame:
            if self._connection.reason is not None:
                self._reopen(None)
            answer = ask(
                self._connection, {"type": "checkpoint", **({} if tag is None else {"tag": tag})}, "checkpointed"
            )
            if answer["step"] != self.step:
                raise MuondError(
                    "FRAME_UNEXPECTED", f"the service kept step {answer['step']}, this client is at {self.step}"
                )
            return answer

        return self._outlast(attempt)

    def import_state(self, tensors: Sequence[Tensor], metadata: dict[str, str], *, partial: bool) -> None:
        with Rest(self.address, self._host.retries, self._host.backoff) as rest:
            answer = rest.import_state(self.opened["run"], tensors, metadata, partial=partial)
        self.moved(answer["step"], answer["digest"])

    def moved(self, step: int, digest: str) -> None:
        self.step, self.digest = step, digest

    def reopen(self, checkpoint: str | None = None) -> None:
        self._connection.close(MuondError("CLIENT_CLOSED", "the run is opened again"))
        frame: Frame = {**self._resuming(), **({} if checkpoint is None else {"checkpoint": checkpoint})}
        self._connection, self.opened = self._outlast(lambda: self._handshake(frame, self.step))
        self.step, self.digest = self.opened["step"], self.opened["digest"]

    def release(self) -> None:
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was released"))

    def hurry(self) -> None:
        self._patient = False

    def close(self) -> None:
        self._stop.set()
        self._jobs.put(None)
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was closed"))
        self._transport.close()

    @property
    def members(self) -> dict[MemberKey, bool]:
        return {**members_of(self.opened), **self._connection.members}

    @property
    def transport(self) -> str:
        taken = self._transport.taken
        return "websocket" if taken is None else taken.kind

    def arenas_of(self, parameter: int) -> Arenas | None:
        return self._transport.taken

    def _handshake(self, frame: Frame, known_step: int) -> tuple[Connection, Frame]:
        try:
            connection, opened = self._transport.agree(lambda offers: enter(self._addresses, frame, offers))
        except MuondError as error:
            if error.code != "RUN_NOT_FOUND":
                raise
            raise lost_state(error, known_step) from error
        self._addresses = self._addresses.led_by(connection.endpoint)
        return connection, opened

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
