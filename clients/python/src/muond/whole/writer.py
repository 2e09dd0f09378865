"""The writer of a run that several processes have together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import NoReturn, TypeVar

from ..connection import Connection
from ..error import MuondError
from ..rest import Rest, Tensor
from ..steps.again import require_same_history
from ..steps.attempts import Attempts
from ..steps.exchange import Taken
from ..steps.parameter import Bound
from ..steps.service_writer import ServiceWriter, open_service
from ..steps.step import Step
from ..steps.updates import Memory, Update
from ..steps.writer import Failed, Host
from ..transport.address import Addresses, Endpoint
from ..wire.frame import Frame, MemberKey
from .head import Head
from .placement import Placement
from .rest import WholeRest
from .round import Round
from .shares import Cut, ShardArenas, Shares, of_whole

T = TypeVar("T")


class WholeWriter:
    """Has a connection to each shard and one to the head. Steps are taken in a thread of its own, one at a time."""

    def __init__(self, host: Host, frame: Frame, connection: Connection, placed: Frame) -> None:
        """Opens the shards of ``placed``, which ``connection`` was answered to the ``frame``.

        Where one cannot be opened none is, and a whole that was made for it goes: not one that another trainer has taken
        meanwhile, nor one of which a process has steps.
        """
        self._host = host
        self._frame = frame
        self.head = Head(host.addresses, frame, connection)
        self.step: int = placed["step"]
        self.digest: str = placed["digest"]
        self.opened: Frame = placed
        """With what its shards say: ``groups``, ``member`` and ``members``, ``ahead`` as the whole counts."""
        self.shards: list[ServiceWriter] = []
        try:
            self._placement = self._read(placed)
            self.cut = Cut(self._placement, frame)
            self.shards = self._open_shards()
            self._settle_at(placed)
        except BaseException as error:
            self._close_all()
            if not placed["resumed"] and not _is_others(error):
                self._delete_unused()
            raise
        self.patient = True
        self._arenas: dict[int, ShardArenas] = {}
        self._released = False
        self._stop = threading.Event()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="muond whole", daemon=True)
        self._thread.start()

    # What it is

    @property
    def address(self) -> Endpoint:
        return self.head.endpoint

    @property
    def generation(self) -> int:
        return self._placement.generation

    @property
    def members(self) -> Mapping[MemberKey, bool]:
        of_each = [shard.members for shard in self.shards]
        return {member: all(members.get(member, False) for members in of_each) for member in of_each[0]}

    @property
    def transport(self) -> str:
        return "+".join(sorted({shard.transport for shard in self.shards}))

    def arenas_of(self, parameter: int) -> ShardArenas | None:
        shard = self.cut.shard_of[parameter]
        own = self.shards[shard].arenas_of(self.cut.locals[shard][parameter])
        if own is None:
            return None
        known = self._arenas.get(shard)
        if known is None or known.own is not own:
            known = self._arenas[shard] = ShardArenas(own, self.cut.locals[shard])
        return known

    # Steps

    def deliver_to(self, parameters: Sequence[Bound], memory: Memory, deliver: Callable[[Update], None]) -> None:
        for index, (shard, indices) in enumerate(zip(self.shards, self.cut.indices, strict=True)):

            def of_shard(update: Update, indices: Sequence[int] = indices) -> None:
                deliver(of_whole(update, parameters, indices))

            shard.deliver_to(self.cut.bound(parameters, index), memory, of_shard)
        self.expect(self.step + 1)

    def expect(self, step: int) -> None:
        for shard in self.shards:
            shard.expect(step)

    def take(self, step: Step, settle: Callable[[Taken | Failed], None]) -> None:
        self.patient = True
        shares = Shares(step, self.cut)
        step.lead(shares)

        def job() -> None:
            outcome = Round(self, shares).run()
            if isinstance(outcome, Taken):
                self.step, self.digest = outcome.receipt["step"], outcome.receipt["digest"]
            settle(outcome)

        self._jobs.put(job)

    def hurry(self) -> None:
        self.patient = False

    def attempts(self) -> Attempts:
        return Attempts(self._host.retries, self._host.backoff)

    def wait(self, seconds: float) -> bool:
        return self._stop.wait(seconds)

    def look_again(self, step: int | None) -> None:
        """Asks the head where the shards are. ``step`` is the one in flight.

        Raises MuondError, STEP_CONFLICT for a whole that is not where this client has left it.
        """
        if self._released or self._stop.is_set():
            raise MuondError("CLIENT_CLOSED", "the run was released")
        placed = self.head.ask_again(self.step)
        require_same_history(placed, step, self.step, self.digest)
        self._place(placed)
        self.opened = {**self.opened, **{key: placed[key] for key in ("generation", "shards", "server")}}

    # Between steps

    def checkpoint(self, tag: str | None) -> Frame:
        # Asked again it is the same checkpoint, so it is tried again as a step is.
        def attempt() -> Frame:
            if self.head.is_lost:
                self.look_again(None)
            answer = self.head.checkpoint(tag)
            if answer["step"] != self.step:
                raise MuondError(
                    "FRAME_UNEXPECTED", f"the service kept step {answer['step']}, this client is at {self.step}"
                )
            return answer

        return self._outlast(attempt)

    def rest(self, *, patient: bool = True) -> Rest:
        return self._host.rest(WholeRest, self.address, patient=patient)

    def import_state(self, tensors: Sequence[Tensor], metadata: dict[str, str], *, partial: bool) -> NoReturn:
        raise MuondError(
            "STATE_INVALID",
            f"state cannot be given to run '{self._frame['run']}', which {len(self.shards)} processes have together: go back to a "
            "checkpoint of it, or give the state to a run of one process (shards=1)",
        )

    def moved(self, step: int, digest: str) -> None:
        self.step, self.digest = step, digest

    def reopen(self, checkpoint: str | None = None) -> None:
        self._released = False

        def attempt() -> None:
            placed = self.head.ask_again(self.step, checkpoint)
            self._place(placed)
            at = [place.checkpoint for place in self._placement.shards]
            _each(lambda shard: self.shards[shard].reopen(at[shard]), len(at))
            self._settle_at(placed)

        self._outlast(attempt)

    def release(self) -> None:
        self._released = True
        self.head.release()
        for shard in self.shards:
            shard.release()

    def close(self) -> None:
        self._stop.set()
        self._jobs.put(None)
        self._close_all()

    # Opening

    def _read(self, placed: Frame) -> Placement:
        return Placement.of(placed, len(self._frame["parameters"]), self.head.endpoint)

    def _open_shards(self) -> list[ServiceWriter]:
        """Opens all of them, or none."""
        opened: list[ServiceWriter] = []

        def open_one(shard: int) -> ServiceWriter:
            # A step is tried again by the whole.
            host = replace(self._host, addresses=Addresses((self._placement.shards[shard].endpoint,)), retries=0)
            opened.append(open_service(host, self._placement.opening(self._frame, shard)))
            return opened[-1]

        try:
            return _each(open_one, len(self._placement.shards))
        except BaseException:
            for shard in opened:
                shard.close()
            raise

    def _place(self, placed: Frame) -> None:
        placement = self._read(placed)
        self._placement.require_same_cut(placement)
        is_newer = placement.generation != self.generation
        self._placement = placement
        for index, (shard, place) in enumerate(zip(self.shards, placement.shards, strict=True)):
            says = {"shard": {"index": index, "generation": placement.generation}}
            shard.goes_to(Addresses((place.endpoint,)), says)
            if is_newer:
                # Votes of the old generation are refused, and the head may have lost those that it had taken.
                message = f"shard '{place.run}' was opened with an older generation than {placement.generation}"
                shard.drop(MuondError("STALE_GENERATION", message))

    def _settle_at(self, placed: Frame) -> None:
        """The whole is open: at which step, and what its shards say of it."""
        self.step, self.digest = placed["step"], placed["digest"]
        elsewhere = next((s for s in self.shards if s.step not in (self.step, self.step + 1)), None)
        if elsewhere is not None:
            message = f"run '{placed['run']}' is at step {self.step}, its shard '{elsewhere.opened['run']}' at step {elsewhere.step}"
            raise MuondError("STEP_CONFLICT", f"{message}: go back to a checkpoint")
        # Where the shards are not in one step, those behind have the hyperparameters of the step that is to be taken.
        last = min(self.shards, key=lambda shard: (shard.step, len(shard.opened["ahead"])))
        of_all: Frame = {key: last.opened[key] for key in ("groups", "member", "members") if key in last.opened}
        self.opened = {**placed, **of_all, "ahead": self._ahead()}

    def _ahead(self) -> list[int]:
        """The parameters that were applied for the next step already: all of a shard that has finished it."""
        ahead: list[int] = []
        for shard, indices in zip(self.shards, self.cut.indices, strict=True):
            is_done = shard.step > self.step
            ahead += indices if is_done else [indices[position] for position in shard.opened["ahead"]]
        return sorted(ahead)

    def _delete_unused(self) -> None:
        rest = WholeRest(self.head.endpoint)
        with suppress(MuondError), rest:
            rest.delete_unused(self._frame["run"])

    def _close_all(self) -> None:
        self.head.close()
        for shard in self.shards:
            shard.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _outlast(self, attempt: Callable[[], T]) -> T:
        """In the caller's thread; raises what was not worth another attempt."""
        attempts = self.attempts()
        while True:
            try:
                return attempt()
            except MuondError as error:
                wait = attempts.wait_after(error)
                if wait is None or self._stop.wait(wait):
                    raise


def _each(work: Callable[[int], T], count: int) -> list[T]:
    """Does something for each shard at once. Raises the first error, once all have ended."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def _is_others(error: BaseException) -> bool:
    """Whether an open has failed because another trainer has the run."""
    return isinstance(error, MuondError) and error.code in ("RUN_BUSY", "TAKEN_OVER")
