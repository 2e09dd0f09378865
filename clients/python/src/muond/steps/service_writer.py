"""The writer of a run that one service has: keeps the run open over as many connections as it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

from ..connection import Connection, Listener
from ..error import MuondError
from ..rest import Rest, Tensor
from ..transport.address import Addresses, Endpoint
from ..transport.arenas import Arenas
from ..transport.choice import Transport
from ..wire.frame import Frame, MemberKey, members_of
from .again import require_same_history, resuming
from .asking import ask, enter, lost_state
from .attempts import Attempts
from .exchange import Exchange, How, Taken
from .parameter import Bound
from .step import Step
from .updates import Memory, Update, Updates
from .writer import Failed, Host

T = TypeVar("T")


def enter_shared(host: Host, frame: Frame) -> tuple[Transport, Connection, Frame]:
    """Opens a run for the first time, with the memory that is to be shared; it is not retried."""
    transport = host.sharing.transport(host.addresses, frame["parameters"])
    try:
        return transport, *transport.agree(lambda offers: enter(host.addresses, frame, offers))
    except BaseException:
        transport.close()
        raise


def open_service(host: Host, frame: Frame) -> ServiceWriter:
    """Opens a run that one process has. Raises MuondError for another."""
    transport, connection, answer = enter_shared(host, frame)
    try:
        return ServiceWriter(host, frame, transport, _require_opened(connection, answer), answer)
    except BaseException:
        transport.close()
        raise


def _require_opened(connection: Connection, answer: Frame) -> Connection:
    if answer["type"] != "opened":
        is_now = f"run '{answer['run']}' has several shards now, it is opened as that of one process"
        remade = MuondError("RUN_MISMATCH", f"{is_now}: was it made anew?")
        connection.close(remade)
        raise remade
    return connection


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
        self._begun = self.step, self.digest
        """Where the step in flight began. A shard that has ended it may lose it again, until the others have ended it."""
        self._updates: Updates
        self._stop = threading.Event()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._patient = True
        self._given_up: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="muond writer", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Endpoint:
        return self._addresses.first

    def deliver_to(self, parameters: Sequence[Bound], memory: Memory, deliver: Callable[[Update], None]) -> None:
        self._updates = Updates(parameters, self.step + 1, memory, deliver)

    def expect(self, step: int) -> None:
        self._updates.next(step)
        self._begun = self.step, self.digest

    @property
    def delivered(self) -> int:
        """How many parameters have their update of the step in progress."""
        return self._updates.delivered

    def take(self, step: Step, settle: Callable[[Taken | Failed], None]) -> None:
        self._patient, self._given_up = True, None
        updates = self._updates

        def attempt() -> Taken:
            if self._connection.reason is not None:
                self._reopen(step.number)
            if self._given_up is not None:
                raise self._given_up
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

    def rest(self, *, patient: bool = True) -> Rest:
        return self._host.rest(Rest, self.address, patient=patient)

    def import_state(self, tensors: Sequence[Tensor], metadata: dict[str, str], *, partial: bool) -> None:
        with self.rest() as rest:
            answer = rest.import_state(self.opened["run"], tensors, metadata, partial=partial)
        self.moved(answer["step"], answer["digest"])

    def moved(self, step: int, digest: str) -> None:
        self.step, self.digest = step, digest

    def reopen(self, checkpoint: str | None = None) -> None:
        self._connection.close(MuondError("CLIENT_CLOSED", "the run is opened again"))
        frame: Frame = {**resuming(self._frame), **({} if checkpoint is None else {"checkpoint": checkpoint})}
        self._connection, self.opened = self._outlast(lambda: self._handshake(frame, self.step))
        self.step, self.digest = self.opened["step"], self.opened["digest"]

    def release(self) -> None:
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was released"))

    def hurry(self) -> None:
        self._patient = False

    def give_up(self, error: BaseException) -> None:
        """The step in flight fails with this error, at once."""
        self._patient, self._given_up = False, error
        self.drop(error)

    def drop(self, error: BaseException) -> None:
        """Ends the connection, for this reason."""
        self._connection.fail(error)

    def watch(self, lost: Callable[[BaseException], None] | None) -> None:
        """Between two steps: ``lost`` is called with the reason once the connection is over; None: no longer."""
        self._connection.listen(None if lost is None else _Watch(lost))

    def goes_to(self, at: Addresses, changes: Frame) -> None:
        """The run is opened there from now on, with these keys of ``open``."""
        self._addresses = at
        self._frame = {**self._frame, **changes}

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
        self._addresses = self._addresses.led_by(_require_opened(connection, opened).endpoint)
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

    def _reopen(self, number: int | None) -> None:
        reason = self._connection.reason
        if isinstance(reason, MuondError) and reason.code in ("TAKEN_OVER", "CLIENT_CLOSED"):
            # A run taken by another client is not taken back: the two would go on for ever.
            raise reason
        connection, opened = self._handshake(resuming(self._frame), self.step)
        self._connection = connection
        require_same_history(opened, number, *self._begun)
        self.opened = opened


class _Watch(Listener):
    """Tells when a connection is over on which nothing is expected."""

    def __init__(self, lost: Callable[[BaseException], None]) -> None:
        self._lost = lost

    def closed(self, reason: BaseException) -> None:
        self._lost(reason)
