"""A run's one writer as the trainer sees it, whoever computes the run behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..rest import HURRIED_SECONDS, Rest, Tensor
from ..transport.address import Addresses, Endpoint
from ..transport.arenas import GradientSlots
from ..transport.choice import MakeArenas, Transport
from ..wire.frame import Frame, MemberKey
from .backoff import Backoff
from .exchange import Taken
from .parameter import Bound, sizes_of
from .step import Step
from .updates import Memory, Update

RETRIES = 8


@dataclass(frozen=True)
class Sharing:
    """How gradients and updates are to travel."""

    asked: str = "websocket"
    on_gpu: MakeArenas | None = None

    def transport(self, at: Addresses, declared: Sequence[Mapping[str, Any]]) -> Transport:
        """The memory to share with who is at these addresses, for parameters as ``open`` declares them."""
        return Transport.choose(self.asked, at, sizes_of(declared), self.on_gpu)


@dataclass(frozen=True)
class Host:
    """What a run needs to know of its service."""

    addresses: Addresses
    retries: int = RETRIES
    """Consecutive failed attempts at one step that brought no new update, before it is given up."""
    backoff: Backoff = field(default_factory=Backoff)
    chunk_bytes: int = 1 << 24
    """Most bytes of a gradient in one message; the service's own limit holds too."""
    sharing: Sharing = field(default_factory=Sharing)

    def rest(self, kind: type[Rest], at: Endpoint, *, patient: bool) -> Rest:
        if patient:
            return kind(at, self.retries, self.backoff)
        return kind(at, timeout_seconds=HURRIED_SECONDS)


@dataclass(frozen=True)
class Failed:
    """Why a step was given up."""

    error: BaseException


class Writer(Protocol):
    """Steps are taken one at a time, in other threads than the trainer's. Nothing here refers to the run, so a forgotten
    run is let go."""

    step: int
    """The last finished step."""
    digest: str
    """Of that step."""

    @property
    def opened(self) -> Frame:
        """The answer to the newest ``open``."""
        ...

    @property
    def address(self) -> Endpoint:
        """The process that the run was opened at."""
        ...

    @property
    def members(self) -> Mapping[MemberKey, bool]:
        """{member: whether it has a connection}, as the newest frames tell."""
        ...

    @property
    def transport(self) -> str:
        """How gradients and updates travel: ``cuda-ipc``, ``shm`` or ``websocket``."""
        ...

    def arenas_of(self, parameter: int) -> GradientSlots | None:
        """The shared memory that has a slot for this parameter, under this index; None where it goes over a socket."""
        ...

    def deliver_to(self, parameters: Sequence[Bound], memory: Memory, deliver: Callable[[Update], None]) -> None:
        """Who gets the updates, and in what memory. Called once, before the first step."""
        ...

    def take(self, step: Step, settle: Callable[[Taken | Failed], None]) -> None:
        """Takes a step, again and again over new connections as long as the trouble is worth a retry; then ``settle`` is
        called, after the last update."""
        ...

    def expect(self, step: int) -> None:
        """``step`` is the next one: updates of those before are never delivered again."""
        ...

    def checkpoint(self, tag: str | None) -> Frame:
        """Has the service keep the state of this step; returns its `checkpointed`. Not while a step is in flight."""
        ...

    def rest(self, *, patient: bool = True) -> Rest:
        """The REST interface to the run, as patient as this one, or with one short attempt."""
        ...

    def import_state(self, tensors: Sequence[Tensor], metadata: dict[str, str], *, partial: bool) -> None:
        """Replaces the state of the run, or with ``partial`` that of the parameters given. Not while a step is in flight."""
        ...

    def moved(self, step: int, digest: str) -> None:
        """State was imported into the run: a step is taken from there."""
        ...

    def reopen(self, checkpoint: str | None = None) -> None:
        """Opens the run again wherever it is now, or at a checkpoint. Not while a step is in flight. Tried again as a step is."""
        ...

    def release(self) -> None:
        """Ends the connection in order, and leaves the run to whoever opens it next; `reopen` takes it up again."""
        ...

    def hurry(self) -> None:
        """The step in flight is not tried again: someone waits who wants to leave."""
        ...

    def close(self) -> None:
        """Ends connections and threads; a step in flight fails with CLIENT_CLOSED."""
        ...
