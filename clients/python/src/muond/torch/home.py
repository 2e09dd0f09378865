"""Where an optimizer's state lives: its run, the parameters as the run has them, and what is to be changed there."""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..error import MuondError
from ..rest import Rest
from ..run import Run
from ..transport.address import Endpoint
from .opening import new_run_name, open_slots
from .settings import Settings
from .slots import Slot, group_names, make_slots
from .state.fingerprint import content_digest
from .state.kinds import state_names
from .state.matching import Loaded
from .state.place import is_at
from .state.restoring import go_to, open_at
from .state.tensors import read_begun, read_state, write_state
from .state.view import State

Groups = Sequence[Mapping[str, Any]]

# How long an optimizer that is dropped waits for the service.
_GOING_SECONDS = 5.0

_living: weakref.WeakValueDictionary[tuple[str, str], Home] = weakref.WeakValueDictionary()
"""The optimizers of this process that have their run open, by service and run: their state is copied, never taken from them."""


class Home:
    """``groups`` gives the optimizer's param_groups. What opens, reads or writes raises MuondError."""

    def __init__(self, settings: Settings, address: Endpoint, groups: Callable[[], Groups]) -> None:
        self.settings = settings
        self.address = address
        self._own_name = new_run_name()
        self.name = settings.run or self._own_name
        self.run: Run | None = None
        self.closed = False
        self.slots: list[Slot] = []
        self.group_names: list[str] = []
        """What the run calls the param_groups, whatever names they are given later."""
        self.state = State(self)
        self._groups = groups
        self._goes: weakref.finalize[..., Home] | None = None
        self._listed: list[list[int]] = []
        self._slot_of: dict[torch.Tensor, Slot] = {}
        self._undeclared: list[torch.Tensor] = []

    # Life

    def close(self, *, delete: bool = False) -> None:
        """Closes the connection; with ``delete`` the run goes as well."""
        was_open = self.run is not None and not self.closed
        self.closed = True
        if delete and self._goes is not None:
            self._goes.detach()
        _living.pop((self.address.authority, self.name), None)
        if self.run is not None:
            self.run.close()
        if delete and was_open:
            with self.rest() as rest:
                rest.delete(self.name)

    def open(self, mode: str, checkpoint: str | None = None) -> Run:
        """Opens the run, and imports what was written into the state before there was one."""
        if self.closed:
            raise MuondError("CLIENT_CLOSED", f"the optimizer of run '{self.name}' was closed")
        run, slots = self._open(self.name, mode, checkpoint)
        self._settle(run)
        self._adopt(run, slots, self.name)
        try:
            self.carry_out()
        except BaseException:
            self.run = None
            self._leave(run)
            raise
        return run

    def slot_of(self, parameter: torch.Tensor) -> Slot | None:
        """What the run knows a parameter as; None for one that it does not have."""
        return self._slot_of.get(parameter)

    def rest(self) -> Rest:
        return Rest(self.address, self.settings.retries, self.settings.backoff)

    def _open(
        self,
        name: str,
        mode: str,
        checkpoint: str | None = None,
        groups: Groups | None = None,
        loaded: Mapping[torch.Tensor, Any] | None = None,
    ) -> tuple[Run, list[Slot]]:
        groups = self._groups() if groups is None else groups
        with_state = self.state.changes() if loaded is None else loaded

        def wanted(parameter: torch.Tensor) -> bool:
            return parameter in with_state or self._wanted(parameter)

        slots = make_slots(groups, self.settings, wanted, self.slots)
        return open_slots(name, slots, groups, self.address, self.settings, mode=mode, checkpoint=checkpoint), slots

    def _wanted(self, parameter: torch.Tensor) -> bool:
        """Frozen parameters are not declared, but where hooks or attentions are set up for them."""
        everything = self.settings.overlap or self.settings.attentions
        return bool(everything) or parameter.requires_grad or parameter.grad is not None or parameter in self._slot_of

    def _adopt(self, run: Run, slots: list[Slot], name: str) -> None:
        _living.pop((self.address.authority, self.name), None)
        self.run, self.slots, self.name = run, slots, name
        groups = self._groups()
        self.group_names = group_names(groups)
        self._slot_of = {slot.tensor: slot for slot in slots}
        self._goes = self._go_with_this(run)
        self._listed = [[id(parameter) for parameter in group["params"]] for group in groups]
        self._undeclared = [p for group in groups for p in group["params"] if p not in self._slot_of and p.numel() > 0]
        _living[self.address.authority, name] = self

    def _leave(self, run: Run) -> None:
        """Closes a run that this optimizer does not keep; one that was made for it goes."""
        run.close()
        if not run.opened["resumed"]:
            with suppress(MuondError), self.rest() as rest:
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

    def _go_with_this(self, run: Run) -> weakref.finalize[..., Home] | None:
        """A run that nobody has named and no folder keeps goes with its optimizer, or a sweep would leave one for each trial."""
        if self._goes is not None:
            self._goes.detach()
        if not self._is_own(run.name):
            return None
        return weakref.finalize(self, _delete_unkept, os.getpid(), run, self.address)

    # What was changed here and is to be changed there

    def carry_out(self) -> bool:
        """Makes the run what param_groups and ``optimizer.state`` say; True if it is another run now. Not while a step is in flight.

        Raises ValueError and MuondError before anything has changed.
        """
        assert self.run is not None
        if self._is_declared():
            self._import_changes(self.run)
            return False
        self._declare_again(self.run)
        return True

    def changed(self) -> bool:
        """Whether ``carry_out`` would do anything."""
        return not self._is_declared() or self.state.replaced or bool(self.state.changes())

    def _is_declared(self) -> bool:
        """Whether the run's parameters are those of the param_groups, in the same groups, with the same shapes."""
        return (
            [[id(parameter) for parameter in group["params"]] for group in self._groups()] == self._listed
            and not any(self._wanted(parameter) for parameter in self._undeclared)
            and all(slot.tensor.shape == slot.shape for slot in self.slots)
        )

    def _import_changes(self, run: Run) -> None:
        changes, replaced = self.state.changes(), self.state.replaced
        # A run that is new has no state already.
        if changes or (replaced and (run.step_count or run.opened["resumed"])):
            slots = self.slots if replaced else [slot for slot in self.slots if slot.tensor in changes]
            self._write(run, slots, changes, partial=not replaced)
        if changes or replaced:
            self.state.moved()

    def _write(
        self,
        run: Run,
        slots: Sequence[Slot],
        state: Mapping[torch.Tensor, Mapping[str, Any]],
        *,
        partial: bool = False,
    ) -> None:
        groups = self._groups()
        rows = [(slot, groups[slot.group], state.get(slot.tensor, {})) for slot in slots]
        write_state(run, rows, partial=partial)

    def _declare_again(self, old: Run) -> None:
        """Goes on in another run, with the parameters that there are now and the state that they have. A run's own are fixed."""
        self._check_shapes()
        contents = self.state.contents()
        run, slots = self._open_next(old.name, {p: entries for p, entries in contents.items() if entries})
        try:
            if any(contents.get(slot.tensor) for slot in slots):
                self._write(run, slots, contents)
        except BaseException:
            self._leave(run)
            raise
        old.close()
        self._adopt(run, slots, run.name)
        self.state.moved()
        self._let_go(old, run)

    def _check_shapes(self) -> None:
        """torch cannot go on with a state of another shape than the parameter's either."""
        changes = self.state.changes()
        for slot in self.slots:
            if slot.tensor.shape != slot.shape and slot.tensor not in changes and slot.tensor in self.state:
                raise RuntimeError(
                    f"parameter '{slot.name}' has shape {list(slot.tensor.shape)}, its state has {list(slot.shape)}: give "
                    "optimizer.state[parameter] a state of the new shape, or delete the old one"
                )

    def _open_next(self, name: str, loaded: Mapping[torch.Tensor, Any]) -> tuple[Run, list[Slot]]:
        """A new run beside the one of this name: ``name.2``, ``name.3``…"""
        base, number = (found[1], int(found[2])) if (found := re.fullmatch(r"(.*)\.(\d+)", name)) else (name, 1)
        while True:
            number += 1
            try:
                return self._open(f"{base}.{number}", "create", loaded=loaded)
            except MuondError as error:
                if error.code != "RUN_EXISTS":
                    raise

    def _let_go(self, old: Run, new: Run) -> None:
        """The run that was left goes, unless somebody has named it and its checkpoints may be wanted."""
        with suppress(MuondError), self.rest() as rest:
            if self._is_own(old.name) or not rest.has_checkpoints(old.name):
                rest.delete(old.name)
                return
        warnings.warn(
            f"the parameters of run '{old.name}' have changed: its state goes on in run '{new.name}'. '{old.name}' and its "
            f"checkpoints stay at step {old.step_count}",
            stacklevel=6,
        )

    # What optimizer.state asks

    def parameters(self) -> dict[torch.Tensor, frozenset[str]]:
        found: dict[torch.Tensor, frozenset[str]] = {}
        for group in self._groups():
            found.update(dict.fromkeys(group["params"], state_names(group)))
        return found

    def begun(self) -> list[torch.Tensor]:
        run = self._readable()
        if run is None:
            return []
        with self.rest() as rest:
            begun = read_begun(rest, run, self.slots)
        return [slot.tensor for slot, has in zip(self.slots, begun, strict=True) if has]

    def read(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        run = self._readable()
        if run is None:
            return {}
        with self.rest() as rest:
            tensors = read_state(rest, run, self.slots)
        return {slot.tensor: entries for slot, entries in zip(self.slots, tensors, strict=True) if entries}

    def _readable(self) -> Run | None:
        """The run between two steps; None before there is one, unless this optimizer is to go on with one that exists."""
        if self.run is None and self.settings.mode != "create":
            self.open(self.settings.mode, self.settings.checkpoint)
        if self.run is not None and self.run.in_flight:
            raise RuntimeError(
                f"step {self.run.step_count + 1} of run '{self.name}' is under way: take it before its state is looked at"
            )
        return self.run

    # state_dict

    def saved(self, *, tensors: bool = False) -> tuple[dict[torch.Tensor, dict[str, Any]], dict[str, Any] | None]:
        """What a state_dict holds: the entries of each parameter, and the token that says what they are of.

        ``tensors``: the state itself, also where the settings say ``checkpoint``.
        """
        own = self.state.own()
        if self._readable() is None:
            return _together(self.state.contents(), own), None
        self.carry_out()
        run = self.run
        assert run is not None
        token: dict[str, Any] = {"version": 1, "run": run.name, "step": run.step_count, "digest": run.digest}
        if self.settings.state == "checkpoint" and not tensors:
            # Its tag keeps it for as long as the dictionary may be loaded.
            token["checkpoint"] = run.checkpoint(f"state_dict.{run.step_count}").id
            return own, token
        state = self.read()
        token["content"] = _content(self._groups(), state)
        return _together(state, own), token

    def load(self, token: Mapping[str, Any], loaded: Loaded, groups: Groups) -> None:
        """Goes to the state of a state_dict that was matched; ``groups`` are the param_groups as they are to be.

        Raises ValueError and MuondError; run and state are as they were then.
        """
        if self.closed:
            raise MuondError("CLIENT_CLOSED", f"the optimizer of run '{self.name}' was closed")
        if "checkpoint" in token:
            self._load_checkpoint(token, groups)
        elif self.run is not None or token or loaded.state or self.settings.mode != "create":
            self._load_content(token, loaded, groups)
        self.state = State(self)
        for key, entries in loaded.own.items():
            if isinstance(key, torch.Tensor):
                self.state[key].update(entries)
            else:
                self.state[key] = entries

    def _load_checkpoint(self, token: Mapping[str, Any], groups: Groups) -> None:
        name = str(token["run"]) if self._may_take(str(token["run"])) else self.name
        if self.run is not None and not self.run.closed and self.run.name == name and self._is_declared():
            with self.rest() as rest:
                go_to(self.run, rest, token)
            return
        made: list[list[Slot]] = []

        def open_it(mode: str, checkpoint: str | None) -> Run:
            run, slots = self._open(name, mode, checkpoint, groups, {})
            made.append(slots)
            return run

        if self.run is not None and self.run.name == name:
            self.run.close()
        with self.rest() as rest:
            run = open_at(open_it, rest, token)
        if self.run is not None:
            self.run.close()
        self._adopt(run, made[-1], name)

    def _may_take(self, name: str) -> bool:
        """Whether a state_dict of this run is one of this optimizer's own, under the name it has or one that followed it."""
        given = self.settings.run
        return given is None or re.fullmatch(re.escape(given) + r"(\.\d+)?", name) is not None

    def _load_content(self, token: Mapping[str, Any], loaded: Loaded, groups: Groups) -> None:
        old = self.run
        if old is None:
            run, slots = self._open_for(token, groups, loaded.state)
        elif self._is_declared() and loaded.state.keys() <= self._slot_of.keys():
            run, slots = old, self.slots
        else:
            run, slots = self._open_next(old.name, loaded.state)
        try:
            if not self._has_content(run, token, loaded, groups):
                _settle_for_import(run)
                self._write(run, slots, loaded.state)
        except BaseException:
            if run is not old:
                self._leave(run)
            raise
        self._adopt(run, slots, run.name)
        if old is not None and old is not run:
            old.close()
            self._let_go(old, run)

    def _has_content(self, run: Run, token: Mapping[str, Any], loaded: Loaded, groups: Groups) -> bool:
        """Whether the run has the very tensors of the dictionary: it is where they were read, and they are unchanged since."""
        return (
            is_at(run, token.get("step"), token.get("digest"))
            and not run.in_flight
            and not (self.state.replaced or self.state.changes())
            and token.get("content") == _content(groups, loaded.state)
        )

    def _open_for(
        self, token: Mapping[str, Any], groups: Groups, loaded: Mapping[torch.Tensor, Any]
    ) -> tuple[Run, list[Slot]]:
        """The run of the dictionary where it is this optimizer's to take; else one of its own, which gets a copy."""
        name = str(token.get("run", self.name))
        if name != self.name and self._may_take(name) and (self.address.authority, name) not in _living:
            try:
                return self._open(name, "create_or_resume", None, groups, loaded)
            except MuondError as error:
                if error.code not in ("RUN_BUSY", "RUN_MISMATCH"):
                    raise
        # The settings' mode is for a run without a history; the service may know this one or not.
        return self._open(self.name, "create_or_resume", None, groups, loaded)


def _content(groups: Groups, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> str:
    """The digest of the service's entries, in the order of the param_groups."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return content_digest((str(i), state[p]) for i, p in enumerate(parameters) if p in state)


def _delete_unkept(process: int, run: Run, address: Endpoint) -> None:
    if os.getpid() != process:  # pragma: no cover - in a forked child, which is not measured
        return
    run.close()
    # The service may be gone, and nobody waits for this.
    with suppress(MuondError), Rest(address, timeout_seconds=_GOING_SECONDS) as rest:
        if not rest.has_checkpoints(run.name):
            rest.delete(run.name)


def _settle_for_import(run: Run) -> None:
    """A step that was begun, here or by an earlier trainer, is not waited for: all of its state is replaced."""
    if run.in_flight:
        run.reopen()
    if run.ahead:
        run.settle()


def _together(state: Mapping[torch.Tensor, Mapping[str, Any]], own: Mapping[Any, Any]) -> dict[Any, Any]:
    joined: dict[Any, Any] = {parameter: dict(entries) for parameter, entries in state.items() if entries}
    for key, entries in own.items():
        joined[key] = {**joined.get(key, {}), **entries} if isinstance(key, torch.Tensor) else entries
    return joined
