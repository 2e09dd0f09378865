"""One attempt at one step: everything the trainer said goes out over one connection, and every update comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..connection import Connection, Listener
from ..error import MuondError
from ..wire.frame import Frame, frame_error
from .step import Gradient, Step
from .updates import Updates


@dataclass(frozen=True)
class Taken:
    """A finished step: its receipt, and the errors of the gradients that the service refused, of which it was ended without."""

    receipt: Frame
    refused: tuple[MuondError, ...]


class Exchange(Listener):
    """Sends in the caller's thread and hears in the connection's."""

    def __init__(self, connection: Connection, step: Step, updates: Updates, chunk_bytes: int) -> None:
        self._connection = connection
        self._step = step
        self._updates = updates
        self._chunk_bytes = chunk_bytes
        # What the receiving thread finds is told under `step.changed`, which the sending thread waits on.
        self._changed = step.changed
        self._unanswered: set[int] = set()
        self._refused: list[Frame] = []
        self._incomplete: Frame | None = None
        self._receipt: Frame | None = None
        self._failure: BaseException | None = None
        self._length = 0

    def run(self) -> Taken:
        """Returns once every update was delivered. Raises the reason the connection ended, or the service's error.

        A step that is not to be ended without its refused gradients raises when all the others were answered, so that nothing
        is delivered afterwards and ``fields.refused`` names them all.
        """
        self._connection.listen(self)
        if self._step.frame is not None:
            self._connection.send(self._step.frame)
        sent = 0
        while (gradient := self._next(sent)) is not None:
            self._send_gradient(gradient)
            sent += 1
        receipt = self._end()
        self._connection.listen()
        return Taken(receipt, tuple(frame_error(frame) for frame in self._refused))

    def _next(self, sent: int) -> Gradient | None:
        """The next gradient, as soon as the trainer has it; None after the last."""
        step = self._step
        self._wait(lambda: len(step.gradients) > sent or step.skipped is not None)
        return step.gradients[sent] if len(step.gradients) > sent else None

    def _send_gradient(self, gradient: Gradient) -> None:
        if gradient.ready is not None:
            gradient.ready()
        with self._changed:
            self._unanswered.add(gradient.parameter)
        data = gradient.data
        for offset in range(0, len(data), self._chunk_bytes):
            header = {"type": "gradient", "parameter": gradient.parameter, "step": self._step.number, "offset": offset}
            self._connection.send_data(header, data[offset : offset + self._chunk_bytes])

    def _end(self) -> Frame:
        while True:
            known = len(self._refused)
            self._raise_if_refused()
            skipped = [*(self._step.skipped or ()), *(frame["parameter"] for frame in self._refused[:known])]
            self._connection.send(
                {"type": "end", "step": self._step.number, **({"skipped": skipped} if skipped else {})}
            )
            self._wait(lambda: self._receipt is not None or self._incomplete is not None)
            # The service may have ended the step although it refused other bytes for what it had applied before.
            self._raise_if_refused()
            if self._receipt is not None:
                return self._receipt
            # An `end` that crossed a refusal on its way is answered with STEP_INCOMPLETE; the refusal is known by now.
            incomplete, self._incomplete = self._incomplete, None
            if len(self._refused) == known and incomplete is not None:
                raise frame_error(incomplete)

    def _raise_if_refused(self) -> None:
        """Unless the step may be ended without: what is not finite can be skipped, other bytes than were applied cannot."""
        with self._changed:
            refused = list(self._refused)
        if not refused or (self._step.skip_refused and all(f["code"] == "GRADIENT_NOT_FINITE" for f in refused)):
            return
        self._wait(lambda: not self._unanswered)
        names = tuple(self._updates.name(frame["parameter"]) for frame in self._refused)
        raise frame_error(self._refused[0], refused=names)

    def _wait(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: holds() or self._failure is not None)
            # A service that shuts down sends the receipt and then closes: what came before the end counts.
            if not holds() and self._failure is not None:
                raise self._failure

    # From here on: the receiving thread.

    def frame(self, frame: Frame) -> None:
        kind = frame["type"]
        if kind == "update":
            self._answered(self._updates.take(frame))
        elif kind == "receipt":
            self._take_receipt(frame)
        elif kind == "error":
            self._take_error(frame)
        elif kind != "draining":
            # A step in flight may end while the service drains; the next one hears of it again, as an error worth a retry.
            raise MuondError("FRAME_UNEXPECTED", f"the service sent {kind} during a step")

    def destination(self, frame: Frame, length: int) -> memoryview | None:
        if frame["type"] != "update":
            return None
        self._length = length
        return self._updates.destination(frame, length)

    def placed(self, frame: Frame) -> None:
        self._answered(self._updates.placed(frame, self._length))

    def closed(self, reason: BaseException) -> None:
        with self._changed:
            self._failure = self._failure if self._failure is not None else reason
            self._changed.notify_all()

    def _answered(self, parameter: int | None) -> None:
        if parameter is None:
            return
        with self._changed:
            self._unanswered.discard(parameter)
            self._changed.notify_all()

    def _take_receipt(self, receipt: Frame) -> None:
        refused = {frame["parameter"] for frame in self._refused}
        missing = [
            g.parameter
            for g in self._step.gradients
            if not self._updates.has(g.parameter) and g.parameter not in refused
        ]
        if receipt["step"] != self._step.number or missing:
            what = f"'{self._updates.name(missing[0])}' has no update yet" if missing else f"it is {self._step.number}"
            raise MuondError("FRAME_UNEXPECTED", f"the service sent the receipt of step {receipt['step']}: {what}")
        with self._changed:
            self._receipt = receipt
            self._changed.notify_all()

    def _take_error(self, frame: Frame) -> None:
        with self._changed:
            if _is_refusal(frame):
                self._unanswered.discard(frame["parameter"])
                self._refused.append(frame)
            elif frame["code"] == "STEP_INCOMPLETE":
                self._incomplete = frame
            else:
                self._failure = frame_error(frame)
            self._changed.notify_all()


def _is_refusal(frame: Frame) -> bool:
    """An error about one gradient: its state stayed as it was, and the stream goes on."""
    return "parameter" in frame and not frame["retryable"] and frame["status"] in (409, 422)
