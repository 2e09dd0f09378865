"""One attempt at one step: everything the trainer said goes out over one connection, and every update comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ..connection import Connection, Listener
from ..error import MuondError
from ..transport.arenas import Arenas
from ..wire.frame import Frame, frame_error
from .step import Gradient, Step
from .updates import Updates

# What is sent at once: fewer system calls cost less, but nothing else can be said meanwhile.
_BATCH_BYTES = 16 << 20
_BATCH_FRAMES = 128


@dataclass(frozen=True)
class Taken:
    """A finished step: its receipt, and the errors of the gradients that the service refused, of which it was ended without."""

    receipt: Frame
    refused: tuple[MuondError, ...]


@dataclass(frozen=True)
class How:
    """How a step goes over a connection."""

    chunk_bytes: int
    arenas: Arenas | None
    """The memory that the connection shares with the service."""
    averages: bool
    """Whether gradients are means of replicas: then no update comes before ``end``, and nothing is applied without it."""
    retries: int
    """How often a quorum that did not come is waited for again."""


class Exchange(Listener):
    """Sends in the caller's thread and hears in the connection's."""

    def __init__(self, connection: Connection, step: Step, updates: Updates, how: How) -> None:
        self._connection = connection
        self._arenas = how.arenas
        self._averages = how.averages
        self._retries = how.retries
        self._step = step
        self._updates = updates
        self._chunk_bytes = how.chunk_bytes
        # What the receiving thread finds is told under `step.changed`, which the sending thread waits on.
        self._changed = step.changed
        self._unanswered: set[int] = set()
        self._refused: list[Frame] = []
        """Refusals that the step cannot be ended without."""
        self._incomplete: Frame | None = None
        self._lost_quorum: Frame | None = None
        self._is_late = False
        """Whether the step was closed without this replica: its updates come with ``end``, whatever was sent."""
        self._receipt: Frame | None = None
        self._failure: BaseException | None = None
        self._length = 0

    def run(self) -> Taken:
        """Returns once every update was delivered. Raises the reason the connection ended, or the service's error.

        A step that is not to be ended without its refused gradients raises when all the others were answered, so that nothing
        is delivered afterwards and ``fields.refused`` names them all.
        """
        self._connection.listen(self)
        frame = self._step.frame()
        if frame is not None:
            self._connection.send(frame)
        sent = 0
        while gradients := self._next(sent):
            self._send_gradients(gradients)
            sent += len(gradients)
        receipt = self._end()
        self._connection.listen()
        return Taken(receipt, tuple(frame_error(frame) for frame in self._step.left_out.values()))

    def _next(self, sent: int) -> list[Gradient]:
        """The next gradients, as soon as the trainer has one; none after the last."""
        step = self._step
        self._wait(lambda: len(step.gradients) > sent or step.skipped is not None)
        batch: list[Gradient] = []
        size = 0
        for gradient in step.gradients[sent : sent + _BATCH_FRAMES]:
            size += 0 if gradient.data is None else len(gradient.data)
            # What has to be waited for does not keep back what need not.
            if batch and (size > _BATCH_BYTES or gradient.ready not in (None, batch[0].ready)):
                break
            batch.append(gradient)
        return batch

    def _send_gradients(self, gradients: Sequence[Gradient]) -> None:
        if self._is_late:  # pragma: no cover - it may be told while it still sends
            return
        # Gradients that were copied together have one `ready`.
        for ready in {gradient.ready: None for gradient in gradients if gradient.ready is not None}:
            ready()
        with self._changed:
            sent = [gradient for gradient in gradients if gradient.parameter not in self._step.left_out]
            self._unanswered.update(gradient.parameter for gradient in sent)
        shared = [gradient.parameter for gradient in sent if self._is_shared(gradient)]
        if shared:
            self._connection.send({"type": "gradients", "step": self._step.number, "parameters": shared})
        frames = (frame for gradient in sent if not self._is_shared(gradient) for frame in self._chunks(gradient))
        at_once = min(max(1, _BATCH_BYTES // self._chunk_bytes), _BATCH_FRAMES)
        while batch := list(islice(frames, at_once)):
            self._connection.send_data(batch)

    def _chunks(self, gradient: Gradient) -> Iterator[tuple[Frame, memoryview]]:
        header = {"type": "gradient", "parameter": gradient.parameter, "step": self._step.number}
        data = gradient.bytes
        offset = self._updates.gradient_offset(gradient.parameter)
        for position in range(0, len(data), self._chunk_bytes):
            yield {**header, "offset": offset(position)}, data[position : position + self._chunk_bytes]

    def _is_shared(self, gradient: Gradient) -> bool:
        """Whether the service finds the gradient in memory that this connection shares."""
        return gradient.arenas is not None and gradient.arenas is self._arenas

    def _end(self) -> Frame:
        lost_quorums = 0
        weight = {} if self._step.weight is None else {"weight": self._step.weight}
        while True:
            self._raise_if_refused()
            with self._changed:
                left_out = list(self._step.left_out)
            skipped = [*(self._step.skipped or ()), *left_out]
            self._connection.send(
                {"type": "end", "step": self._step.number, **({"skipped": skipped} if skipped else {}), **weight}
            )
            self._wait(self._is_ended)
            # The service may have ended the step although it refused other bytes for what it had applied before.
            self._raise_if_refused()
            if self._receipt is not None:
                return self._receipt
            if self._lost_quorum is not None:
                # The gradients are there still: others may come for the next `end`.
                lost, self._lost_quorum = self._lost_quorum, None
                lost_quorums += 1
                if lost_quorums > self._retries:
                    raise frame_error(lost)
                continue
            # An `end` that crossed a refusal on its way is answered with STEP_INCOMPLETE; the refusal is known by now.
            incomplete, self._incomplete = self._incomplete, None
            if len(self._step.left_out) == len(left_out) and incomplete is not None:
                raise frame_error(incomplete)

    def _is_ended(self) -> bool:
        # What another replica does with a parameter may be told as a refusal of the parameter.
        is_refused = self._averages and any(frame["code"] == "STEP_CONFLICT" for frame in self._refused)
        answers = (self._receipt, self._incomplete, self._lost_quorum)
        return is_refused or any(answer is not None for answer in answers)

    def _raise_if_refused(self) -> None:
        """Raises the first refusal that the step cannot be ended without, once every gradient was answered.

        Of the mean of replicas none is before ``end``, and none after one that was taken back.
        """
        with self._changed:
            if not self._refused:
                return
        if not self._averages:
            self._wait(lambda: not self._unanswered)
        refused = [*self._step.left_out, *(frame["parameter"] for frame in self._refused)]
        raise frame_error(self._refused[0], refused=tuple(self._updates.name(parameter) for parameter in refused))

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
        elif kind == "updates" and self._arenas is not None:
            for parameter in self._updates.take_shared(frame, self._arenas):
                self._answered(parameter)
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
            # Nobody waits for one answer more, but who has been refused one; waking costs more than the rest of this.
            if self._refused:
                self._changed.notify_all()

    def _take_receipt(self, receipt: Frame) -> None:
        refused = {frame["parameter"] for frame in self._refused} | set(self._step.left_out)
        missing = [
            g.parameter
            for g in self._step.gradients
            # What others have skipped has no update for a replica that has sent it too late.
            if not self._is_late and not self._updates.has(g.parameter) and g.parameter not in refused
        ]
        if receipt["step"] != self._step.number or missing:
            what = f"'{self._updates.name(missing[0])}' has no update yet" if missing else f"it is {self._step.number}"
            raise MuondError("FRAME_UNEXPECTED", f"the service sent the receipt of step {receipt['step']}: {what}")
        with self._changed:
            self._receipt = receipt
            self._changed.notify_all()

    def _take_error(self, frame: Frame) -> None:
        with self._changed:
            if frame.get("left_out"):
                self._is_late = True
                self._unanswered.clear()
                self._refused.clear()
            elif _is_refusal(frame):
                self._unanswered.discard(frame["parameter"])
                # A gradient that is not finite can be left out of its step; one that differs from the applied one cannot.
                if self._step.skip_refused and frame["code"] == "GRADIENT_NOT_FINITE":
                    self._step.left_out[frame["parameter"]] = frame
                elif self._failure is None:
                    self._refused.append(frame)
            elif frame["code"] == "STEP_INCOMPLETE":
                self._incomplete = frame
            elif frame["code"] == "QUORUM_LOST":
                self._lost_quorum = frame
            elif self._failure is None:
                # Behind a `step` frame that was refused everything is: the first error says why.
                self._failure = frame_error(frame)
            self._changed.notify_all()


def _is_refusal(frame: Frame) -> bool:
    """An error about one gradient: its state stayed as it was, and the stream goes on."""
    return "parameter" in frame and not frame["retryable"] and frame["status"] in (409, 422)
