"""Where an optimizer's state lives: its run, the parameters as the run has them, and what is to be changed there."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, KeysView, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..error import MuondError
from ..rest import Rest
from ..run import Run
from ..transport.address import Addresses, Endpoint, another
from ..whole.rest import WholeRest
from .copies import Copies
from .living import begins, ends, go_with
from .opening import Replica, new_run_name, open_slots
from .parts import Parts
from .ranks import Ranks
from .settings import Settings
from .shards import whole_entries
from .slots import Slot, group_names, make_slots, sharded_as
from .state.kinds import state_names
from .state.place import Followed
from .state.tensors import read_begun, read_state, write_state
from .state.view import State

Groups = Sequence[Mapping[str, Any]]
Row = tuple[Slot, Mapping[str, Any], Mapping[str, Any]]
"""A parameter, its group, and the entries of its state."""


def _close(run: Run | None) -> None:  # pragma: no cover - another rank fails, in a process of its own
    if run is not None:
        run.close()


def _write_from_first(ranks: Ranks, run: Run, rows: Sequence[Row], *, partial: bool) -> None:
    """Rank 0 gives the run its state, and all ranks go on from there. A collective."""
    ranks.together(lambda: write_state(run, rows, partial=partial) if ranks.rank == 0 else None, lambda _: None)
    step, digest = ranks.from_first((run.step_count, run.digest))
    run.moved(step, digest)


class Home:
    """``groups`` gives the optimizer's param_groups. What opens, reads or writes raises MuondError."""

    def __init__(self, settings: Settings, addresses: Addresses, groups: Callable[[], Groups]) -> None:
        self.settings = settings
        self.addresses = addresses
        self._own_name = new_run_name()
        self.name = settings.run or self._own_name
        self.run: Run | None = None
        self.closed = False
        self.slots: list[Slot] = []
        self.group_names: list[str] = []
        """What the run calls the param_groups, whatever names they are given later."""
        self.state = State(self)
        self.groups = groups
        self._goes: weakref.finalize[..., Any] | None = None
        self._listed: list[list[int]] = []
        self._slot_of: dict[torch.Tensor, Slot] = {}
        self._undeclared: list[torch.Tensor] = []
        self.ranks: Ranks | None = None
        """The members of the run, where the parameters are sharded or each process sends a part of them."""
        self.copies: Copies | None = None
        """Processes that have the same weights, of which the first one has the run."""
        self._followed: Followed | None = None
        self.replica: Replica | None = None
        """Which of several replicas of the run this is; None for the only one."""

    # Life

    def join(self, ranks: Ranks | None, copies: Copies | None) -> None:
        """All ranks and all copies have one run: that of the first."""
        self.ranks, self.copies = ranks, copies
        for each in (ranks, copies):
            if each is not None:
                self.name, self._own_name = each.from_first((self.name, self._own_name))

    @property
    def parts(self) -> Parts | None:
        """The members of the run, where all of them have the same whole parameters."""
        return self.ranks if isinstance(self.ranks, Parts) else None

    @property
    def follows(self) -> bool:
        """Whether another process takes the steps, and this one has its weights."""
        return self.copies is not None and not self.copies.is_first

    def follow(self, at: Followed) -> None:
        """The process that takes the steps is there."""
        self._followed = at
        self.name = at.name
        self.slots = make_slots(self.groups(), self.settings, self._wanted, self.slots)
        self._slot_of = {slot.tensor: slot for slot in self.slots}

    @property
    def step_count(self) -> int:
        """The last finished step, 0 before the run is open."""
        at = self._followed if self.run is None else self.run
        return 0 if at is None else at.step_count

    def close(self, *, delete: bool = False) -> None:
        """Closes the connection; with ``delete`` the run goes as well."""
        was_open = self.run is not None and not self.closed
        self.closed = True
        if delete and self._goes is not None:
            self._goes.detach()
        ends(self.addresses, self.name)
        if self.run is not None:
            self.run.close()
        if delete and self.run is not None and was_open and self._is_first:
            with self.run.rest() as rest:
                rest.delete(self.name)

    def open(self, mode: str, checkpoint: str | None = None) -> Run:
        """Opens the run, and imports what was written into the state before there was one."""
        if self.closed:
            raise MuondError("CLIENT_CLOSED", f"the optimizer of run '{self.name}' was closed")
        if self.follows:
            raise RuntimeError(
                f"run '{self.name}' is that of the first process with these weights: this one has them from there, and no connection"
            )
        run, slots = self.open_run(self.name, mode, checkpoint)
        if self.replica is None:
            self._settle(run)
        self.adopt(run, slots, self.name)
        try:
            self.carry_out()
        except BaseException:
            self.run = None
            self.leave(run)
            raise
        return run

    def declared(self) -> KeysView[torch.Tensor]:
        """The parameters that the run has."""
        return self._slot_of.keys()

    def slot_of(self, parameter: torch.Tensor) -> Slot | None:
        """What the run knows a parameter as; None for one that it does not have."""
        return self._slot_of.get(parameter)

    def rest_of(self, run: Run | Followed) -> Rest:
        """The REST interface to a run, or to that of the process that this one follows."""
        if isinstance(run, Run):
            return run.rest()
        kind = WholeRest if run.is_whole else Rest
        return kind(another(run.url, self.addresses.first), self.settings.retries, self.settings.backoff)

    def rest_at(self, kind: type[Rest], at: Endpoint) -> Rest:
        """The REST interface of one of the addresses: of several the next one is tried rather than this one again."""
        retries = self.settings.retries if len(self.addresses.endpoints) == 1 else 0
        return kind(at, retries, self.settings.backoff)

    def open_run(
        self,
        name: str,
        mode: str,
        checkpoint: str | None = None,
        groups: Groups | None = None,
        loaded: Mapping[torch.Tensor, Any] | None = None,
        branch_of: tuple[str, str] | None = None,
    ) -> tuple[Run, list[Slot]]:
        groups = self.groups() if groups is None else groups
        with_state = self.state.changes() if loaded is None else loaded

        def wanted(parameter: torch.Tensor) -> bool:
            return parameter in with_state or self._wanted(parameter)

        slots = make_slots(groups, self.settings, wanted, self.slots)
        ranks, parts = self.ranks, self.parts
        if parts is not None:
            slots = parts.cut(slots)

        def open_it(mode: str, checkpoint: str | None, branch_of: tuple[str, str] | None) -> Run:
            how = {
                "mode": mode,
                "checkpoint": checkpoint,
                "branch_of": branch_of,
                "ranks": ranks,
                "replica": self.replica,
            }
            return open_slots(name, slots, groups, self.addresses, self.settings, **how)  # type: ignore[arg-type]

        if ranks is None:
            return open_it(mode, checkpoint, branch_of), slots
        # Rank 0 alone makes the run, takes it over or goes back to a checkpoint; then the others join it.
        first = ranks.together(lambda: open_it(mode, checkpoint, branch_of) if ranks.rank == 0 else None, _close)
        run = ranks.together(lambda: first or open_it("resume", None, None), _close)
        return run, slots

    @property
    def _is_first(self) -> bool:
        return self.ranks is None or self.ranks.rank == 0

    def _wanted(self, parameter: torch.Tensor) -> bool:
        """Frozen parameters are not declared, but where hooks or attentions are set up for them."""
        everything = self.settings.overlap or self.settings.attentions
        return bool(everything) or parameter.requires_grad or parameter.grad is not None or parameter in self._slot_of

    def adopt(self, run: Run, slots: list[Slot], name: str) -> None:
        ends(self.addresses, self.name)
        self.run, self.slots, self.name = run, slots, name
        groups = self.groups()
        self.group_names = group_names(groups)
        self._slot_of = {slot.tensor: slot for slot in slots}
        if self._goes is not None:
            self._goes.detach()
        self._goes = go_with(self, run) if self._is_own(name) and self._is_first else None
        self._listed = [[id(parameter) for parameter in group["params"]] for group in groups]
        self._undeclared = [p for group in groups for p in group["params"] if p not in self._slot_of and p.numel() > 0]
        begins(self, self.addresses, name)

    def leave(self, run: Run) -> None:
        """Closes a run that this optimizer does not keep; one that was made for it goes."""
        run.close()
        if not run.opened["resumed"] and self._is_first:
            with suppress(MuondError), run.rest() as rest:
                rest.delete(run.name)

    def _settle(self, run: Run) -> None:
        names = run.settle()
        if not names:
            return
        warnings.warn(
            f"run '{run.name}' was left in the middle of step {run.step_count}: the momentum of {len(names)} parameters has its "
            f"gradients, no weight has their updates ({', '.join(names[:3])}{'…' if len(names) > 3 else ''}). "
            "For an exact state go back to a checkpoint.",
            stacklevel=5,
        )

    def _is_own(self, name: str) -> bool:
        """Whether this optimizer has made the name up: nobody else knows the run."""
        return self.settings.run is None and re.fullmatch(re.escape(self._own_name) + r"(\.\d+)?", name) is not None

    # What was changed here and is to be changed there

    def carry_out(self) -> bool:
        """Makes the run what param_groups and ``optimizer.state`` say; True if it is another run now. Not while a step is in flight.

        Raises ValueError and MuondError before anything has changed.
        """
        assert self.run is not None
        if self.is_declared():
            self._import_changes(self.run)
            return False
        self._declare_again(self.run)
        return True

    def carry_out_alone(self) -> None:
        """The same while the other ranks do something else. What all of them have to do together is left for the next step."""
        assert self.run is not None
        if self.parts is None:
            self.carry_out()
        elif self._is_first and self.is_declared():  # pragma: no branch - in other processes, which are not measured
            self._import_changes(self.run, alone=True)

    def changed(self) -> bool:
        """Whether ``carry_out`` would do anything."""
        return not self.is_declared() or self.state.replaced or bool(self.state.changes())

    def is_declared(self) -> bool:
        """Whether the run's parameters are those of the param_groups, in the same groups, with the same shapes."""
        return (
            [[id(parameter) for parameter in group["params"]] for group in self.groups()] == self._listed
            and not any(self._wanted(parameter) for parameter in self._undeclared)
            and all(slot.tensor.shape == slot.shape for slot in self.slots)
        )

    def _import_changes(self, run: Run, *, alone: bool = False) -> None:
        changes, replaced = self.state.changes(), self.state.replaced
        # A run that is new has no state already.
        is_due = bool(changes) or (replaced and bool(run.step_count or run.opened["resumed"]))
        if self.parts is not None and not alone:
            # The ranks have the same program: what the first one has written holds for all, and where it has the run.
            is_due, step, digest = self.parts.from_first((is_due, run.step_count, run.digest))
            run.moved(step, digest)
        if is_due:
            slots = self.slots if replaced else [slot for slot in self.slots if slot.tensor in changes]
            self.write(run, slots, changes, partial=not replaced, alone=alone)
        if changes or replaced:
            self.state.moved()

    def write(
        self,
        run: Run,
        slots: Sequence[Slot],
        state: Mapping[torch.Tensor, Mapping[str, Any]],
        *,
        partial: bool = False,
        alone: bool = False,
    ) -> None:
        """Gives a run the state of parameters. Where all ranks have these it is a collective, unless the first one is ``alone``."""
        self.require_whole()
        groups = self.groups()
        rows = [(slot, groups[slot.group], state.get(slot.tensor, {})) for slot in slots]
        if self.parts is None or alone:
            write_state(run, rows, partial=partial)
        else:
            _write_from_first(self.parts, run, rows, partial=partial)

    def write_shards(
        self, ranks: Ranks, run: Run, slots: Sequence[Slot], state: Mapping[torch.Tensor, Mapping[str, Any]]
    ) -> None:
        """Gives a run the state of sharded parameters. A collective: rank 0 puts the whole tensors together in host memory."""
        groups = self.groups()
        rows = [
            (slot, groups[slot.group], whole_entries(state.get(slot.tensor, {}), ranks.rank == 0)) for slot in slots
        ]
        _write_from_first(ranks, run, rows, partial=False)

    def require_whole(self) -> None:
        """Raises ValueError where the parameters are sharded: what one rank writes into ``optimizer.state`` no other one knows of."""
        if self.ranks is not None and self.parts is None:
            raise ValueError(
                f"run '{self.name}' has sharded parameters, whose state cannot be written by one rank: load_state_dict takes it "
                "from all"
            )

    def _declare_again(self, old: Run) -> None:
        """Goes on in another run, with the parameters that there are now and the state that they have. A run's own are fixed."""
        self._check_shapes()
        contents = self.state.contents()
        run, slots = self.open_next(old.name, {p: entries for p, entries in contents.items() if entries})
        try:
            if any(contents.get(slot.tensor) for slot in slots):
                self.write(run, slots, contents)
        except BaseException:
            self.leave(run)
            raise
        old.close()
        self.adopt(run, slots, run.name)
        self.state.moved()
        listed = self.parameters()
        # As torch: what was taken out of the groups may come back, and has its state then.
        self.state.keep({parameter: entries for parameter, entries in contents.items() if parameter not in listed})
        self.followed(old, run)

    def _check_shapes(self) -> None:
        """torch cannot go on with a state of another shape than the parameter's either."""
        changes = self.state.changes()
        for slot in self.slots:
            if slot.tensor.shape != slot.shape and slot.tensor not in changes and slot.tensor in self.state:
                raise RuntimeError(
                    f"parameter '{slot.name}' has shape {list(slot.tensor.shape)}, its state has {list(slot.shape)}: give "
                    "optimizer.state[parameter] a state of the new shape, or delete the old one"
                )

    def open_next(
        self,
        name: str,
        loaded: Mapping[torch.Tensor, Any],
        groups: Groups | None = None,
        branch_of: tuple[str, str] | None = None,
    ) -> tuple[Run, list[Slot]]:
        """A new run beside the one of this name: ``name.2``, ``name.3``…"""
        base, number = (found[1], int(found[2])) if (found := re.fullmatch(r"(.*)\.(\d+)", name)) else (name, 1)
        while True:
            number += 1
            try:
                return self.open_run(f"{base}.{number}", "create", None, groups, loaded, branch_of)
            except MuondError as error:
                if error.code != "RUN_EXISTS":
                    raise

    def let_go(self, old: Run) -> bool:
        """Deletes a run that was left, unless its checkpoints may be wanted; True if it stays.

        Of a run that nobody has named those with a tag may be: a state_dict may hold one.
        """
        with suppress(MuondError), old.rest() as rest:
            if not rest.has_checkpoints(old.name, tagged=self._is_own(old.name)):
                rest.delete(old.name)
                return False
        return True

    def followed(self, old: Run, new: Run) -> None:
        """Another run goes on with the state of ``old``, because the parameters are others."""
        if self.let_go(old):
            warnings.warn(
                f"the parameters of run '{old.name}' have changed: its state goes on in run '{new.name}'. '{old.name}' and its "
                f"checkpoints stay at step {old.step_count}",
                stacklevel=6,
            )

    # What optimizer.state asks

    def parameters(self) -> dict[torch.Tensor, frozenset[str]]:
        found: dict[torch.Tensor, frozenset[str]] = {}
        for group in self.groups():
            found.update(dict.fromkeys(group["params"], state_names(group)))
        return found

    def begun(self) -> list[torch.Tensor]:
        run = self.readable()
        if run is None:
            return []
        with self.rest_of(run) as rest:
            begun = read_begun(rest, run, self.slots)
        return [slot.tensor for slot, has in zip(self.slots, begun, strict=True) if has]

    def read(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        run = self.readable()
        if run is None:
            return {}
        with self.rest_of(run) as rest:
            tensors = read_state(rest, run, self.slots)
        rows = zip(self.slots, tensors, strict=True)
        return {slot.tensor: sharded_as(slot, entries) for slot, entries in rows if entries}

    def readable(self) -> Run | Followed | None:
        """The run between two steps; None before there is one, unless this optimizer is to go on with one that exists."""
        if self.follows:
            return self._followed
        if self.run is None and self.settings.mode != "create":
            if self.parts is not None:
                raise RuntimeError(
                    f"run '{self.name}' is not open, and all ranks open it together: call open() on each of them first"
                )
            self.open(self.settings.mode, self.settings.checkpoint)
        if self.run is not None and self.run.in_flight:
            raise RuntimeError(
                f"step {self.run.step_count + 1} of run '{self.name}' is under way: take it before its state is looked at"
            )
        return self.run
