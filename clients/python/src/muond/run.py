"""A run of the service, in numpy: open it, take steps, read receipts."""

from __future__ import annotations

import os
import ssl
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import numpy.typing as npt

from .declaration import Member, Parameter, Quorum
from .error import ErrorFields, MuondError
from .opening import open_writer
from .receipt import Checkpoint, Receipt
from .rest import Rest, Tensor
from .steps.apply import Weights, apply_update
from .steps.backoff import Backoff
from .steps.exchange import Taken
from .steps.gradient import bytes_of
from .steps.interrupt import interrupt_later
from .steps.owed import Groups, merge_groups, owed_groups
from .steps.parameter import Bound, bind, check_bytes
from .steps.step import Gradient, MaxLogits, Step
from .steps.updates import Bytes, Memory, Update
from .steps.writer import RETRIES, Failed, Host, Sharing, Writer
from .transport.address import Endpoint, addresses
from .transport.arenas import GradientSlots
from .transport.choice import MakeArenas
from .wire.dtype import BLOCKS
from .wire.frame import PROTOCOL, Frame, MemberKey

Key = int | str
"""A parameter by index, or by name."""


_PARTED = (
    "was interrupted while its updates were applied: weights and state have parted. "
    "Go back to weights and state of one step (reopen, load_state_dict or rollback)"
)

Apply = Callable[[Sequence[Update]], None]
"""Applies some updates; the memory of their data is used again as soon as it returns."""


def open_run(
    url: str | Sequence[str] | None = None,
    *,
    run: str,
    parameters: Sequence[Parameter],
    groups: Sequence[Mapping[str, Any]] | None = None,
    mode: str = "create_or_resume",
    attentions: Sequence[Mapping[str, Any]] | None = None,
    member: Member | tuple[int, int] | None = None,
    quorum: Quorum | tuple[int, float] | None = None,
    weights: str | None = None,
    takeover: bool = False,
    checkpoint: str | None = None,
    branch_of: tuple[str, str] | None = None,
    client: str | None = None,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    retries: int = RETRIES,
    backoff: Backoff | None = None,
    chunk_bytes: int = 1 << 24,
    shards: int = 0,
    transport: str = "auto",
    gpu_arenas: MakeArenas | None = None,
    apply: Apply | None = None,
    allocate: Callable[[int], Bytes] | None = None,
) -> Run:
    """Opens a run, on a connection of its own; its updates are applied to each parameter's ``data``, in place.

    ``url``: an address, or several of which the first that answers is taken, each as ``muond.transport.address.endpoint`` reads it,
    as ``token``. ``mode``: ``create``, ``resume`` or ``create_or_resume``.
    ``member``: (rank, world size) of a run with many members, of which each sends and receives the ``ranges`` of each
    parameter. A ``Member`` may be of one of several replicas, whose steps are made with the mean of what
    they send; ``quorum``, a ``Quorum``, says when a step may be closed without all of them. ``weights``: a digest of the weights that a
    replica begins with, of the caller's choice; with another one than those of other replicas it is refused (RUN_MISMATCH).
    ``groups``: maps of ``name``, ``algorithm`` or ``preset``, and hyperparameters. ``checkpoint``: with ``resume``, go back to it.
    ``branch_of``: (another run of the service, a checkpoint of that by id or tag); a new run begins with its state, step and digest,
    and the weights must be those of that step.
    ``retries``: consecutive failed attempts at one step that brought nothing new, before it raises; 0 for none.
    ``shards``: over how many processes of the service a new run is to be spread; 0: as the service has it. One that exists has those
    that it has.
    ``transport``: ``shm`` shares memory with a service on this host, ``websocket`` sends everything, ``auto`` tries and falls
    back; ``cuda-ipc`` shares that of a GPU, which ``gpu_arenas`` makes, as ``muond.torch`` does.
    ``apply``: what to do with updates instead. ``allocate``: memory for updates, by bytes.

    Raises MuondError RUN_EXISTS, RUN_NOT_FOUND, RUN_BUSY (see ``takeover``), RUN_MISMATCH, PARAMETER_INVALID…, UNAUTHORIZED,
    CONNECTION_LOST; a first connection is not retried.
    """
    if shards < 0:
        raise ValueError(f"shards is {shards}, at least 0")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, at least 1")
    found = addresses(url, token=token, headers=headers, ssl_context=ssl_context)
    declared = [parameter.declaration() for parameter in parameters]
    given: Frame = {
        "groups": None if groups is None else [dict(group) for group in groups],
        "parameters": declared,
        "attentions": None if attentions is None else [dict(attention) for attention in attentions],
        "member": None if member is None else Member(*member).declaration(),
        "quorum": None if quorum is None else Quorum(*quorum)._asdict(),
        "weights": weights,
        "takeover": takeover or None,
        "checkpoint": checkpoint,
        "from": None if branch_of is None else {"run": branch_of[0], "checkpoint": branch_of[1]},
        "client": client,
    }
    # A branch is always a new run.
    is_default = mode == "create_or_resume"
    frame = {"type": "open", "protocol": PROTOCOL, "run": run, "shards": shards}
    frame["mode"] = "create" if branch_of and is_default else mode
    frame.update({key: value for key, value in given.items() if value is not None})
    reason = _shares_nothing(declared)
    if reason is not None:
        if transport not in ("auto", "websocket"):
            raise ValueError(f"transport={transport!r} is not possible: {reason}")
        transport = "websocket"
    host = Host(found, retries, backoff or Backoff(), chunk_bytes, Sharing(transport, gpu_arenas))
    writer = open_writer(host, frame)
    memory = Memory() if allocate is None else Memory(allocate)
    try:
        return Run(writer, parameters, apply, memory)
    except BaseException:
        writer.close()
        raise


class Run:
    """One run of the service, and the one place that changes the trainer's weights. One step at a time.

    A lost connection is replaced and the step sent again from the beginning, so gradients must not change before the call that
    ends their step returns. Updates are applied by that call, in the caller's thread.
    """

    def __init__(self, writer: Writer, parameters: Sequence[Parameter], apply: Apply | None, memory: Memory) -> None:
        """Use ``open_run``."""
        self.parameters = bind([parameter.declaration() for parameter in parameters])
        self._writer = writer
        self._by_key: dict[Key, Bound] = {parameter.name: parameter for parameter in self.parameters}
        self._by_key.update({parameter.index: parameter for parameter in self.parameters})
        self._memory = memory
        # Nothing here refers to the run itself: one that nobody holds any more is closed at once.
        self._apply = apply or _apply_to([parameter.data for parameter in parameters])
        self._events: SimpleQueue[Update | Taken | Failed] = SimpleQueue()
        writer.deliver_to(self.parameters, memory, self._events.put)
        self._flight: Step | None = None
        self._groups: Groups = writer.opened["groups"]
        self._owed: Groups = {}
        """Hyperparameters of a step that was closed before they came: they are said again with the next one."""
        self._process = os.getpid()
        # A run that nobody holds any more, or that is open when the process ends, is closed in order.
        self._finalizer = weakref.finalize(self, _close_in, os.getpid(), writer)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def name(self) -> str:
        return str(self.opened["run"])

    @property
    def address(self) -> Endpoint:
        """The process that the run was opened at, with the key for it."""
        return self._writer.address

    @property
    def is_whole(self) -> bool:
        """Whether several processes have the run together, a shard each: ``opened["shards"]``."""
        return "shards" in self.opened

    @property
    def opened(self) -> Frame:
        """The service's answer to the newest ``open``: epoch, groups, limits, device and more."""
        return self._writer.opened

    @property
    def members(self) -> Mapping[MemberKey, bool]:
        """{rank: whether it has a connection}, as the service has told last; empty for a run without members.

        In a run with several replicas the keys are (replica, rank).
        """
        return self._writer.members

    def arenas_of(self, index: int) -> GradientSlots | None:
        """The memory that is shared with the service now and has a slot for this parameter; None where it goes over a socket."""
        return self._writer.arenas_of(index)

    @property
    def transport(self) -> str:
        """How gradients and updates travel now: ``cuda-ipc``, ``shm`` or ``websocket``."""
        return self._writer.transport

    @property
    def step_count(self) -> int:
        """The last finished step, 0 at first."""
        return self._writer.step

    @property
    def digest(self) -> str:
        """Of the last finished step: equal digests are equal histories, bit for bit."""
        return self._writer.digest

    @property
    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """{group: every hyperparameter in force}, of the last receipt or of ``opened``."""
        return self._groups

    @property
    def in_flight(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._flight is not None

    @property
    def ahead(self) -> Sequence[int]:
        """Parameters that the service had applied for the next step when the run was opened, until that step is over."""
        ahead: Sequence[int] = self.opened["ahead"] if self.step_count == self.opened["step"] else ()
        return ahead

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def step(
        self,
        gradients: Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike | None],
        *,
        skipped: Iterable[Key] = (),
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        gradient_scale: float | None = None,
        max_logits: MaxLogits | None = None,
        skip_refused: bool = False,
        weight: float | None = None,
    ) -> Receipt:
        """Takes one step: sends every gradient and applies every update.

        ``gradients`` by name, or in the order of the parameters (None: no gradient). ``skipped``: those without one.
        ``groups``: {group: {hyperparameter: value}}, from this step on. ``gradient_scale`` is multiplied into every gradient of
        this step. ``max_logits``: {attention: the largest softmax input of each query head}. ``skip_refused``: see ``begin``.
        ``weight``: see ``end``.

        Raises MuondError; ``fields.refused`` names the parameters whose gradients were refused, the other updates are applied.
        A step that raised can be taken again: with the same options, and the same gradients for every parameter that is not
        refused, since their updates may be applied on either side. Nothing is applied a second time.
        """
        pairs = gradients.items() if isinstance(gradients, Mapping) else enumerate(gradients)
        given = [self._gradient(key, array) for key, array in pairs if array is not None]
        skip = self._indices(skipped)
        step = self._new_step(groups, gradient_scale, max_logits, skip_refused=skip_refused)
        self._add(step, given)
        self._check_complete(step, skip)
        step.finish(skip, weight)
        self._start(step)
        return self._land()

    def begin(
        self,
        *,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        gradient_scale: float | None = None,
        max_logits: MaxLogits | Callable[[], MaxLogits] | None = None,
        skip_refused: bool = False,
    ) -> None:
        """Begins a step whose gradients come one by one; only needed to give it options.

        ``max_logits`` may be a function that returns them once they are there; another thread calls it.
        ``skip_refused``: the step is ended without the gradients that the service refuses, and its receipt names them.
        Raises MuondError STEP_CONFLICT if one has begun.
        """
        self._start(self._new_step(groups, gradient_scale, max_logits, skip_refused=skip_refused))

    def gradient(self, key: Key, gradient: npt.ArrayLike) -> None:
        """Sends one gradient while the backward pass goes on, and begins the step if it has not begun.

        What the service or the network has to say comes with ``end``. Raises MuondError PARAMETER_UNKNOWN, SHAPE_MISMATCH,
        STEP_CONFLICT.
        """
        given = self._gradient(key, gradient)
        self._add(self._growing(), [given])

    def gradient_bytes(self, index: int, data: memoryview, ready: Callable[[], None] | None = None) -> None:
        """As ``gradient``, for bytes in the parameter's ``gradient_dtype``.

        ``ready`` returns once they are there; another thread calls it.
        """
        self.gradients_bytes([Gradient(index, data, ready)])

    def gradients_bytes(self, gradients: Sequence[Gradient]) -> None:
        """As ``gradient_bytes``, for many at once: thousands of small ones cost less so."""
        for gradient in gradients:
            check_bytes(self._find(gradient.parameter), len(gradient.bytes))
        self._add(self._growing(), gradients)

    def gradient_placed(
        self, indices: Iterable[int], arenas: GradientSlots, ready: Callable[[], None] | None = None
    ) -> None:
        """As ``gradient_bytes``, for gradients that lie in their slots of ``arenas``, all of them once ``ready`` returns."""
        self._add(self._growing(), [Gradient(index, None, ready, arenas) for index in indices])

    def has_gradient(self, index: int) -> bool:
        """Whether the step in flight has a gradient of this parameter already."""
        return self._flight is not None and self._flight.has(index)

    def end(self, *, skipped: Iterable[Key] = (), weight: float | None = None) -> Receipt:
        """Ends the step that ``gradient`` began; returns and raises as ``step`` does.

        ``weight`` is that of the replica in the mean of several, say the tokens of its batch; 1 if left out. All ranks of a
        replica give the same.
        """
        step = self._growing()
        skip = self._indices(skipped)
        self._check_complete(step, skip)
        step.finish(skip, weight)
        return self._land()

    def settle(self) -> list[str]:
        """Ends a step that an earlier trainer left in the middle, whose gradients nobody has any more.

        The service has applied them to the momentum of some parameters; their updates are lost, all other parameters are
        skipped. Returns the names of those parameters. For an exact state go back to a checkpoint instead.
        """
        ahead = set(self.ahead)
        if not ahead or self.in_flight:
            return []
        step = self._new_step(None, None, None, skip_refused=False)
        step.finish([parameter.index for parameter in self.parameters if parameter.index not in ahead])
        self._start(step)
        self._land()
        return [self.parameters[index].name for index in sorted(ahead)]

    def checkpoint(self, tag: str | None = None) -> Checkpoint:
        """Has the service keep the state of the last finished step. Not while a step is in flight."""
        self._require_idle()
        answer = self._writer.checkpoint(tag)
        return Checkpoint(answer["checkpoint"], answer["step"], answer["digest"], answer["bytes"])

    def rest(self, *, patient: bool = True) -> Rest:
        """The REST interface to the run, wherever its parts are; ``patient``: as patient as steps are. Use it in a ``with``."""
        return self._writer.rest(patient=patient)

    def import_state(self, tensors: Sequence[Tensor], metadata: dict[str, str], *, partial: bool = False) -> None:
        """Replaces the state of the run, all of it or nothing, or with ``partial`` that of the parameters given.

        Names and form of the tensors are those of ``PUT /v1/runs/{run}/state``. ``digest`` is that of the new state afterwards, and
        ``step_count`` the service's. Not while a step is in flight. Raises MuondError, STATE_INVALID for what does not fit the run.
        """
        self._require_idle()
        self._writer.import_state(tensors, metadata, partial=partial)
        self._writer.expect(self.step_count + 1)

    def moved(self, step: int, digest: str) -> None:
        """Another member has imported state into the run: it goes on from there. Not while a step is in flight."""
        self._require_idle()
        if (step, digest) == (self.step_count, self.digest):
            # Nothing was imported: of a step that has failed and is taken again, some updates are applied already.
            return
        self._writer.moved(step, digest)
        self._writer.expect(self.step_count + 1)

    def reopen(self, checkpoint: str | None = None) -> None:
        """Opens the run again wherever the service has it now, or goes back to a checkpoint; the weights are the caller's.

        Whatever was in flight is forgotten. ``step_count`` and ``digest`` are the service's afterwards.
        """
        self._abandon()
        self._writer.reopen(checkpoint)
        self._groups = self.opened["groups"]
        self._owed = {}
        self._writer.expect(self.step_count + 1)

    def hurry(self) -> None:
        """The step in flight is not tried again after a failure: someone waits who wants to leave."""
        self._writer.hurry()

    def release(self) -> None:
        """Gives the connection up between two steps; ``reopen`` takes the run up again."""
        self._require_idle()
        self._writer.release()

    def close(self) -> None:
        """Closes the connection; the run stays in the service. A step in flight fails with CLIENT_CLOSED."""
        self._finalizer()
        self._flight = None

    # Steps

    def _new_step(
        self,
        groups: Mapping[str, Mapping[str, Any]] | None,
        gradient_scale: float | None,
        max_logits: MaxLogits | Callable[[], MaxLogits] | None,
        *,
        skip_refused: bool,
    ) -> Step:
        self._require_idle()
        options = {"groups": merge_groups(self._owed, groups), "gradient_scale": gradient_scale}
        return Step(self.step_count + 1, options, max_logits, skip_refused=skip_refused)

    def _require_idle(self) -> None:
        if os.getpid() != self._process:  # pragma: no cover - in a forked child, which is not measured
            raise MuondError(
                "CLIENT_CLOSED", f"run '{self.name}' was opened by process {self._process}, this is {os.getpid()}"
            )
        if self.closed:
            raise MuondError("CLIENT_CLOSED", f"run '{self.name}' was closed")
        if self._flight is not None:
            raise _conflict(self._flight, _PARTED if self._flight.skipped is not None else "is still in flight")

    def _start(self, step: Step) -> None:
        self._flight = step
        self._writer.take(step, self._events.put)

    def _growing(self) -> Step:
        if self._flight is None:
            self.begin()
        assert self._flight is not None
        if self._flight.skipped is not None:
            raise _conflict(self._flight, _PARTED)
        return self._flight

    def _land(self) -> Receipt:
        """Applies updates until the step is over. Ctrl-C does not part weights from state: the step is finished first."""
        with interrupt_later(self.hurry):
            return self._finish(self._apply_until_settled())

    def _finish(self, outcome: Taken | Failed) -> Receipt:
        flight, self._flight = self._flight, None
        if isinstance(outcome, Failed):
            raise outcome.error
        self._writer.expect(self.step_count + 1)
        self._groups = outcome.receipt["groups"]
        late = flight is not None and not outcome.receipt.get("contributed", True)
        self._owed = owed_groups(flight.groups, self._groups) if flight is not None and late else {}
        return Receipt.of(outcome.receipt, outcome.refused)

    def _apply_until_settled(self) -> Taken | Failed:
        # Two processes have a GPU in turns: what this one launches between the service's kernels costs more than all of it at the end.
        together = self.transport == "cuda-ipc"
        while True:
            event = self._events.get()
            updates: list[Update] = []
            while isinstance(event, Update):
                updates.append(event)
                try:
                    event = self._events.get(block=together)
                except Empty:
                    break
            try:
                self._apply_updates(updates)
            except BaseException:
                if not isinstance(event, Update):  # pragma: no branch -- whether the receipt is there already is a race
                    self._events.put(event)
                raise
            if not isinstance(event, Update):
                return event

    def _apply_updates(self, updates: Sequence[Update]) -> None:
        if not updates:
            return
        self._apply(updates)
        for update in updates:
            self._give(update)

    def _abandon(self) -> None:
        """Lets go of a step in flight: its connection ends, and what it still brings is not applied."""
        if self._flight is None:
            return
        self._writer.release()
        while isinstance(event := self._events.get(), Update):
            self._give(event)
        self._flight = None

    def _give(self, update: Update) -> None:
        if not update.shared:
            self._memory.give(update.data)

    # What the trainer says

    def _find(self, key: Key) -> Bound:
        found = self._by_key.get(key)
        if found is None:
            raise MuondError("PARAMETER_UNKNOWN", f"run '{self.name}' has no parameter {key!r}")
        return found

    def _indices(self, keys: Iterable[Key]) -> list[int]:
        return sorted({self._find(key).index for key in keys})

    def _gradient(self, key: Key, gradient: npt.ArrayLike) -> Gradient:
        parameter = self._find(key)
        data, arenas = bytes_of(gradient, parameter), self.arenas_of(parameter.index)
        if arenas is None or arenas.kind != "shm":
            return Gradient(parameter.index, data)
        arenas.gradient(parameter.index)[:] = data
        return Gradient(parameter.index, None, arenas=arenas)

    def _add(self, step: Step, gradients: Sequence[Gradient]) -> None:
        """All of them or none."""
        seen: set[int] = set()
        # Of a tensor without elements here there is nothing to be sent.
        gradients = [gradient for gradient in gradients if self.parameters[gradient.parameter].size > 0]
        for gradient in gradients:
            if gradient.parameter in seen or step.has(gradient.parameter):
                raise _conflict(step, f"has a gradient of '{self.parameters[gradient.parameter].name}' already")
            seen.add(gradient.parameter)
        step.add(gradients)

    def _check_complete(self, step: Step, skipped: Sequence[int]) -> None:
        """Every parameter must be accounted for, once."""
        skip = set(skipped)
        both = [f"'{p.name}'" for p in self.parameters if step.has(p.index) and p.index in skip]
        if both:
            raise _conflict(step, f"has both a gradient and a place in skipped for {', '.join(both)}")
        given = [p.size == 0 or step.has(p.index) or p.index in skip for p in self.parameters]
        missing = [f"'{p.name}'" for p, is_given in zip(self.parameters, given, strict=True) if not is_given]
        if missing:
            message = f"step {step.number} has neither a gradient nor a place in skipped for {', '.join(missing)}"
            raise MuondError("STEP_INCOMPLETE", message, ErrorFields(step=step.number))


def _shares_nothing(declared: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the tensors of a run can go over the socket alone; None where they can be shared."""
    in_blocks = [one["name"] for one in declared if one["gradient_dtype"] in BLOCKS or one["update_dtype"] in BLOCKS]
    return f"the tensors of '{in_blocks[0]}' travel in blocks, which share no memory" if in_blocks else None


def _apply_to(arrays: Sequence[Weights | None]) -> Apply:
    def apply(updates: Sequence[Update]) -> None:
        for update in updates:
            weights = arrays[update.parameter.index]
            if weights is None:
                raise ValueError(
                    f"parameter '{update.parameter.name}' was opened without data, and the run without apply="
                )
            apply_update(weights, update)

    return apply


def _conflict(step: Step, what: str) -> MuondError:
    return MuondError("STEP_CONFLICT", f"step {step.number} {what}", ErrorFields(step=step.number))


def _close_in(process: int, writer: Writer) -> None:
    # In a forked child the connection is the parent's.
    if os.getpid() == process:  # pragma: no branch - a forked child is not measured
        writer.close()
