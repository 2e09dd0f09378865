"""Bringing an optimizer's run to where a state_dict says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...error import MuondError
from ...rest import Rest
from ...run import Run
from ...steps.asking import at_first, moved_to
from ...transport.address import Endpoint
from ...whole.rest import WholeRest
from ..living import lives
from ..slots import Slot, sharded_as
from .fingerprint import same_bits
from .matching import Loaded
from .place import is_at, require_digest
from .restoring import go_to, open_at
from .tensors import read_state
from .view import State

if TYPE_CHECKING:
    from ..home import Groups, Home
    from ..ranks import Ranks


def load(home: Home, token: Mapping[str, Any], loaded: Loaded, groups: Groups) -> None:
    """Goes to the state of a state_dict that was matched; ``groups`` are the param_groups as they are to be.

    Raises ValueError and MuondError; run and state are as they were then.
    """
    if home.closed:
        raise MuondError("CLIENT_CLOSED", f"the optimizer of run '{home.name}' was closed")
    if home.ranks is not None and home.parts is None:
        _load_shards(home, home.ranks, token, loaded, groups)
    elif "checkpoint" in token:
        _load_checkpoint(home, token, groups)
    elif home.run is not None or token or loaded.state or home.settings.mode != "create":
        _load_content(home, token, loaded, groups)
    home.state = State(home)
    for key, entries in loaded.own.items():
        if isinstance(key, torch.Tensor):
            home.state[key].update(entries)
        else:
            home.state[key] = entries


def _load_checkpoint(home: Home, token: Mapping[str, Any], groups: Groups) -> None:
    name = str(token["run"])
    if home.run is not None and home.run.name == name:
        if not home.is_declared():
            raise ValueError(
                f"the parameters are not those of run '{name}' any more, whose checkpoint the state dict has"
            )
        go_to(home.run, token)
        return
    run, slots = _take_checkpoint(home, token, groups) or _branch(home, token, groups)
    old = home.run
    home.adopt(run, slots, run.name)
    if old is not None:
        old.close()
        home.let_go(old)


def _take_checkpoint(home: Home, token: Mapping[str, Any], groups: Groups) -> tuple[Run, list[Slot]] | None:
    """The run of the dictionary, at its checkpoint; None where it is another optimizer's or another trainer's."""
    name = str(token["run"])
    if not _may_take(home, name) or lives(home.addresses, name):
        return None
    made: list[list[Slot]] = []

    def open_it(mode: str, checkpoint: str | None) -> Run:
        run, slots = home.open_run(name, mode, checkpoint, groups, {})
        made.append(slots)
        return run

    try:
        return open_at(open_it, token), made[-1]
    except MuondError as error:
        if error.code != "RUN_BUSY":
            raise
        return None


def _branch(home: Home, token: Mapping[str, Any], groups: Groups) -> tuple[Run, list[Slot]]:
    """A run of this optimizer's own that begins with the checkpoint of another one, which goes on as it was."""
    source = (str(token["run"]), str(token["checkpoint"]))
    try:
        if home.run is not None:
            run, slots = home.open_next(home.name, {}, groups, source)
        else:
            run, slots = home.open_run(home.name, "create", None, groups, {}, source)
    except MuondError as error:
        if error.code != "RUN_EXISTS":
            raise
        run, slots = home.open_next(home.name, {}, groups, source)
    try:
        require_digest(*source, run.digest, token["digest"])
    except BaseException:
        home.leave(run)
        raise
    return run, slots


def _may_take(home: Home, name: str) -> bool:
    """Whether a state_dict of this run is one of this optimizer's own, under the name it has or one that followed it."""
    given = home.settings.run
    return given is None or re.fullmatch(re.escape(given) + r"(\.\d+)?", name) is not None


def _load_content(home: Home, token: Mapping[str, Any], loaded: Loaded, groups: Groups) -> None:
    old = home.run
    if old is None:
        run, slots = _open_for(home, token, groups, loaded.state)
    elif home.is_declared() and loaded.state.keys() <= home.declared():
        run, slots = old, home.slots
    else:
        run, slots = home.open_next(old.name, loaded.state)
    try:
        lacks = not _has_content(home, run, slots, token, loaded)
        if lacks if home.parts is None else home.parts.any(lacks):
            _settle_for_import(run)
            home.write(run, slots, loaded.state)
    except BaseException:
        if run is not old:
            home.leave(run)
        raise
    home.adopt(run, slots, run.name)
    if old is not None and old is not run:
        old.close()
        home.followed(old, run)


def _load_shards(home: Home, ranks: Ranks, token: Mapping[str, Any], loaded: Loaded, groups: Groups) -> None:
    """The same for sharded parameters, of any number of ranks. A collective."""
    if "checkpoint" in token:
        raise ValueError(
            f"the state dict is checkpoint '{token['checkpoint']}' of run '{token['run']}': go back to it with mode='resume', "
            "run= and checkpoint=, on any number of ranks"
        )
    old = home.run
    if old is not None and not (home.is_declared() and loaded.state.keys() <= home.declared()):
        raise ValueError(
            f"the parameters are not those of run '{old.name}' any more: make a new optimizer to load it into"
        )
    if old is None:
        run, slots = home.open_run(home.name, "create_or_resume", None, groups, loaded.state)
    else:
        run, slots = old, home.slots
    try:
        if ranks.any(not _has_content(home, run, slots, token, loaded)):
            _settle_for_import(run)
            home.write_shards(ranks, run, slots, loaded.state)
    except BaseException:
        if run is not old:
            home.leave(run)
        raise
    home.adopt(run, slots, run.name)


def _has_content(home: Home, run: Run, slots: Sequence[Slot], token: Mapping[str, Any], loaded: Loaded) -> bool:
    """Whether the run has the very tensors of the dictionary: it is where they were read, and they are unchanged since.

    An import of the same tensors would be right as well, but begin another history of the run.
    """
    if not is_at(run, token.get("step"), token.get("digest")) or run.in_flight:
        return False
    if home.state.replaced or home.state.changes():
        return False
    with run.rest() as rest:
        read = read_state(rest, run, slots)
    found = [sharded_as(slot, entries) for slot, entries in zip(slots, read, strict=True)]
    return all(_same(entries, loaded.state.get(slot.tensor, {})) for slot, entries in zip(slots, found, strict=True))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(same_bits(value, other[name]) for name, value in one.items())


def _open_for(
    home: Home, token: Mapping[str, Any], groups: Groups, loaded: Mapping[torch.Tensor, Any]
) -> tuple[Run, list[Slot]]:
    """The run of the dictionary where it is this optimizer's to take; else one of its own, which gets a copy."""
    name = str(token.get("run", home.name))
    if name != home.name and _may_take(home, name) and not lives(home.addresses, name) and _is_left(home, token):
        try:
            return home.open_run(name, "create_or_resume", None, groups, loaded)
        except MuondError as error:
            if error.code not in ("RUN_BUSY", "RUN_MISMATCH"):
                raise
    # The settings' mode is for a run without a history; the service may know this one or not.
    return home.open_run(home.name, "create_or_resume", None, groups, loaded)


def _is_left(home: Home, token: Mapping[str, Any]) -> bool:
    """Whether the run of the dictionary may be gone on with: it is this optimizer's by name, or nobody has taken it further."""
    if home.settings.run is not None:
        return True
    try:
        found = at_first(home.addresses, lambda at: _found(home, at, str(token["run"])))
    except MuondError as error:
        # It is made anew under its name: this service was started again without its state, or is another one.
        return error.code == "RUN_NOT_FOUND"
    return (found["step"], found["digest"], found["ahead"]) == (token["step"], token["digest"], [])


def _found(home: Home, at: Endpoint, run: str) -> Mapping[str, Any]:
    """Where a run is, as the process says that has it, which is the one at this address or where that one sends clients."""
    try:
        return _found_at(home, at, run)
    except MuondError as error:
        if error.status != 404:
            raise
    return _found_at(home, moved_to(at, run), run)


def _found_at(home: Home, at: Endpoint, run: str) -> Mapping[str, Any]:
    try:
        with home.rest_at(Rest, at) as rest:
            return rest.run(run)
    except MuondError as error:
        if error.status != 404:
            raise
    with home.rest_at(WholeRest, at) as rest:
        return rest.run(run)


def _settle_for_import(run: Run) -> None:
    """A step that was begun, here or by an earlier trainer, is not waited for: all of its state is replaced."""
    if run.in_flight:
        run.reopen()
    if run.ahead:
        run.settle()
