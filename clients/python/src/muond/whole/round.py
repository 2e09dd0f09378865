"""One step of a whole: every shard takes its share of it, and then the head has the receipt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from ..error import ErrorFields, MuondError
from ..steps.attempts import Attempts
from ..steps.exchange import Taken
from ..steps.service_writer import ServiceWriter
from ..steps.writer import Failed
from ..wire.frame import Frame, frame_error
from .head import Head
from .shares import Cut, Shares, together

_STALE = "STALE_GENERATION"


class Whole(Protocol):
    """What a step needs of the run."""

    head: Head
    shards: list[ServiceWriter]
    cut: Cut
    patient: bool

    @property
    def generation(self) -> int:
        """Of the newest placement."""
        ...

    def attempts(self) -> Attempts: ...
    def wait(self, seconds: float) -> bool:
        """Waits; True if the run was closed meanwhile."""
        ...

    def look_again(self, step: int | None) -> None:
        """Asks the head where the shards are."""
        ...


class Round:
    """Everything that happens is put into one queue and handled by the thread that calls ``run``."""

    def __init__(self, whole: Whole, shares: Shares) -> None:
        self._whole = whole
        self._shares = shares
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._running: set[int] = set()
        self._taken: dict[int, Taken] = {}
        self._attempts = [whole.attempts() for _ in whole.shards]
        self._before = [(0, 0)] * len(whole.shards)
        """How many updates each shard had delivered before its newest attempt, and the generation of that."""
        self._ending = whole.attempts()
        self._questions = 0
        self._question: int | None = None
        """Which question for the receipt is to be answered; an answer to another one is of a connection that was given up."""
        self._receipt: Frame | None = None
        self._refusals: list[MuondError] = []
        self._failure: BaseException | None = None
        self._outcome: Taken | Failed | None = None

    def run(self) -> Taken | Failed:
        """Returns when the step is done, or given up: then no shard delivers any more."""
        if self._whole.head.is_lost:
            self._look_again()
        for shard in range(len(self._whole.shards)) if not self._is_given_up else ():
            self._start(shard)
        while self._outcome is None:
            self._events.get()()
        for writer in self._whole.shards:
            writer.watch(None)
        if not isinstance(self._outcome, Failed):
            self._whole.head.rest()
        return self._outcome

    # Shards

    def _start(self, shard: int) -> None:
        writer = self._whole.shards[shard]
        self._running.add(shard)
        self._before[shard] = writer.delivered, self._whole.generation

        def settled(outcome: Taken | Failed) -> None:
            self._events.put(partial(self._settled, shard, outcome))

        writer.take(self._shares.steps[shard], settled)

    def _settled(self, shard: int, outcome: Taken | Failed) -> None:
        self._running.discard(shard)
        if self._receipt is not None:
            self._wind_up()
            return
        if isinstance(outcome, Failed):
            self._failed(shard, outcome.error)
            return
        self._taken[shard] = outcome
        # A shard that is lost before its vote was taken has to end the step again.
        self._whole.shards[shard].watch(lambda reason: self._events.put(partial(self._failed, shard, reason)))
        if self._is_given_up:
            self._wind_up()
        elif self._question is None and len(self._taken) == len(self._whole.shards):
            self._ask_for_receipt()

    def _failed(self, shard: int, error: BaseException) -> None:
        self._taken.pop(shard, None)
        if isinstance(error, MuondError) and error.fields.refused:
            # The others go on: their updates are applied, as those of one process are.
            self._refusals.append(_as_muond(self._whole.cut.error(error, shard)))
        if self._is_given_up:
            self._wind_up()
            return
        delivered, generation = self._before[shard]
        progress = self._whole.shards[shard].delivered > delivered
        attempts = self._attempts[shard]
        if not self._waited(attempts, error, progress=progress, about=shard):
            return
        # A shard that was lost is where it was, unless it cannot be reached there.
        is_elsewhere = _is_stale(error) or not attempts.is_first
        if self._whole.head.is_lost or (is_elsewhere and generation == self._whole.generation):
            self._look_again()
        if not self._is_given_up:
            self._start(shard)

    # The head

    def _ask_for_receipt(self) -> None:
        try:
            self._check_groups()
            self._questions += 1
            self._question = self._questions
            self._whole.head.end(self._shares.number, self._told(self._question))
        except BaseException as error:  # noqa: BLE001 - the round goes on to its end; the trainer gets the error
            self._unanswered(error)

    def _told(self, question: int) -> Callable[[Frame | BaseException], None]:
        return lambda answer: self._events.put(partial(self._answered, question, answer))

    def _answered(self, question: int, answer: Frame | BaseException) -> None:
        if self._is_given_up or question != self._question:
            return
        if isinstance(answer, BaseException):
            self._unanswered(answer)
        elif answer["step"] != self._shares.number:
            self._give_up(
                MuondError(
                    "FRAME_UNEXPECTED",
                    f"the service sent the receipt of step {answer['step']}: it is {self._shares.number}",
                )
            )
        else:
            self._receipt = answer
            # One that was lost behind its vote, and ends the step again, has delivered all of its updates.
            self._stop_shards(MuondError("CONNECTION_LOST", "the step is done"))
            self._wind_up()

    def _unanswered(self, error: BaseException) -> None:
        if not self._waited(self._ending, error):
            return
        self._look_again()
        if not self._is_given_up and len(self._taken) == len(self._whole.shards):
            self._ask_for_receipt()

    def _look_again(self) -> None:
        self._question = None
        attempts = self._whole.attempts()
        while not self._is_given_up:
            try:
                self._whole.look_again(self._shares.number)
            except BaseException as error:  # noqa: BLE001 - as above
                self._waited(attempts, error)
            else:
                return

    def _check_groups(self) -> None:
        """Raises MuondError for shards that have computed with different hyperparameters: the head never takes both votes."""
        first = self._taken[0].receipt["groups"]
        for shard, taken in self._taken.items():
            if taken.receipt["groups"] != first:
                names = [name for name, values in first.items() if taken.receipt["groups"].get(name) != values]
                step = self._shares.number
                raise MuondError(
                    "STEP_CONFLICT",
                    f"step {step} was computed with different hyperparameters of group '{names[0]}' in shards 0 "
                    f"({first[names[0]]}) and {shard} ({taken.receipt['groups'].get(names[0])}), for it was begun by another trainer: "
                    "go back to a checkpoint",
                    ErrorFields(step=step),
                )

    # The end

    @property
    def _is_given_up(self) -> bool:
        return self._failure is not None or bool(self._refusals)

    def _waited(
        self, attempts: Attempts, error: BaseException, *, progress: bool = False, about: int | None = None
    ) -> bool:
        """Waits until another attempt is due; False if there is to be none, and the step is given up."""
        wait = None
        if isinstance(error, MuondError) and self._whole.patient:
            wait = attempts.wait_after(_worth_another(error), progress=progress)
        if wait is not None and self._whole.wait(wait):
            error, wait = MuondError("CLIENT_CLOSED", "the run was closed"), None
        if wait is None:
            self._give_up(error if about is None else self._whole.cut.error(error, about))
        return wait is not None

    def _give_up(self, error: BaseException) -> None:
        self._failure = error
        self._whole.head.fail(error)
        self._stop_shards(error)
        self._wind_up()

    def _stop_shards(self, error: BaseException) -> None:
        for shard in self._running:
            self._whole.shards[shard].give_up(error)

    def _wind_up(self) -> None:
        """Ends the round once no shard delivers any more."""
        if self._running:
            return
        if self._receipt is not None:
            self._outcome = Taken(self._receipt, self._left_out())
        elif self._failure is not None:
            self._outcome = Failed(self._failure)
        else:
            self._outcome = Failed(together(self._refusals))

    def _left_out(self) -> tuple[MuondError, ...]:
        """The errors of the gradients of which the step was ended without."""
        left_out = [(k, frame) for k, step in enumerate(self._shares.steps) for frame in step.left_out.values()]
        return tuple(_as_muond(self._whole.cut.error(frame_error(frame), k)) for k, frame in left_out)


def _is_stale(error: BaseException) -> bool:
    return isinstance(error, MuondError) and error.code == _STALE


def _worth_another(error: MuondError) -> MuondError:
    """A stale generation is answered by asking the head, for which the error is no reason not to go on."""
    return MuondError(error.code, error.message, error.fields, retryable=True) if _is_stale(error) else error


def _as_muond(error: BaseException) -> MuondError:
    assert isinstance(error, MuondError), "a refusal is the service's"
    return error
