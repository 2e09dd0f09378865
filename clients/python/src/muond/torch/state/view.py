"""``optimizer.state`` as torch has it: read from the service when it is looked at, and what is changed in it is carried out."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import torch

from .entries import Entries
from .fingerprint import Fingerprint, fingerprint

_ABSENT = object()


class Source(Protocol):
    """Where the state really is."""

    def parameters(self) -> Mapping[torch.Tensor, frozenset[str]]:
        """Every parameter, and the names of the service's entries for it."""
        ...

    def begun(self) -> list[torch.Tensor]:
        """The parameters that the service has a state of; without a transfer of tensors."""
        ...

    def read(self) -> Mapping[torch.Tensor, dict[str, torch.Tensor]]:
        """The whole state, in one request."""
        ...


class State(MutableMapping[Any, dict[str, Any]]):
    """{parameter: {name: tensor}}, and the program's own entries and keys beside them.

    A look reads the state of all parameters in one request, and holds it until the next step. What was written, deleted or changed
    in place by then is found by content (``changes``), and imported before the step.
    """

    def __init__(self, source: Source) -> None:
        # An optimizer that nobody holds any more is let go at once: nothing here refers to it.
        self._reference = weakref.ref(source)
        self._entries: dict[Any, dict[str, Any]] = {}
        self._marks: dict[Any, dict[str, Fingerprint]] = {}
        self._removed: dict[torch.Tensor, None] = {}
        self._found: Mapping[torch.Tensor, dict[str, torch.Tensor]] | None = None
        self._begun: dict[torch.Tensor, None] | None = None
        self._names: Mapping[torch.Tensor, frozenset[str]] = {}
        self._replaced = False
        self._former: list[tuple[weakref.ref[torch.Tensor], int, str]] = []

    @property
    def _source(self) -> Source:
        source = self._reference()
        if source is None:
            raise RuntimeError("the optimizer of this state is gone: hold it for as long as its state is looked at")
        return source

    # What the optimizer asks

    @property
    def replaced(self) -> bool:
        """Whether all of the state was replaced: a parameter that ``changes`` does not list has none."""
        return self._replaced

    def changes(self) -> dict[torch.Tensor, dict[str, Any]]:
        """{parameter: the service's entries as they should be} for each whose entries are not what the service has.

        Raises RuntimeError for a tensor of an earlier step that was changed since: nobody would see it.
        """
        self._check_former()
        if not self._entries and not self._removed:
            return {}
        names = self._names = self._source.parameters()
        changed: dict[torch.Tensor, dict[str, Any]] = {
            parameter: {} for parameter in self._removed if parameter in names
        }
        for parameter, entries in self._entries.items():
            if parameter not in names or (isinstance(entries, Entries) and not entries.looked):
                continue
            now = {name: value for name, value in entries.items() if name in names[parameter]}
            if {name: fingerprint(value) for name, value in now.items()} != self._marks.get(parameter, {}):
                changed[parameter] = now
        return changed

    def contents(self) -> dict[torch.Tensor, dict[str, Any]]:
        """The service's entries of every parameter as they should be: what it has, with the changes."""
        there = {parameter: entries for parameter, entries in self._look().items() if parameter not in self._removed}
        return {**there, **self.changes()}

    def own(self) -> dict[Any, dict[str, Any]]:
        """The program's own entries and keys; nothing is read for them."""
        names = self._source.parameters()
        own: dict[Any, Any] = {}
        for key, entries in self._entries.items():
            known = names.get(key) if isinstance(key, torch.Tensor) else None
            if not isinstance(entries, dict) or (known is None and not isinstance(key, torch.Tensor)):
                own[key] = entries
                continue
            kept = entries.own() if isinstance(entries, Entries) else entries
            kept = {name: value for name, value in kept.items() if name not in (known or ())}
            if kept:
                own[key] = kept
        return own

    def moved(self) -> None:
        """The service's state has moved, by a step or an import: what is seen of it is read again. Own entries stay."""
        self._found = self._begun = None
        self._replaced = False
        if not self._entries and not self._removed:
            return
        names = self._names = self._source.parameters()
        self._remember(names)
        own = self.own()
        for key in list(self._entries):
            entries = self._entries[key]
            if isinstance(entries, Entries) and key in names:
                entries.forget(self._fill(key))
            elif key in own:
                self._entries[key] = self._made(key, own[key], names[key]) if key in names else own[key]
            else:
                del self._entries[key]
        self._marks.clear()
        self._removed.clear()

    def keep(self, state: Mapping[torch.Tensor, Mapping[str, Any]]) -> None:
        """The state of parameters that the service does not have any more."""
        for parameter, entries in state.items():
            self._entries[parameter] = {**self._entries.get(parameter, {}), **entries}

    def replace(self, state: Mapping[Any, Any]) -> None:
        """As an assignment to ``optimizer.state``."""
        if state is self:
            return
        given = {key: _plain(entries) for key, entries in state.items()}
        self._remember(self._source.parameters())
        self._entries = given
        self._marks.clear()
        self._removed.clear()
        self._found, self._begun = {}, {}
        self._replaced = True

    # A mapping, as defaultdict(dict) is

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if key not in self._entries:
            names = self._names_of(key)
            self._entries[key] = {} if names is None else self._made(key, {}, names)
        return self._entries[key]

    def __setitem__(self, key: Any, entries: Any) -> None:
        if entries is self._entries.get(key, _ABSENT):
            return
        entries = _plain(entries)
        if self._names_of(key) is not None:
            found = self._look().get(key, {})
            # What was handed out has its mark, and may have been changed in place since.
            if key not in self._marks:
                self._marks[key] = {name: fingerprint(value) for name, value in found.items()}
            self._removed.pop(key, None)
        self._entries[key] = entries

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            what = f"a parameter of shape {list(key.shape)}" if isinstance(key, torch.Tensor) else repr(key)
            raise KeyError(f"optimizer.state has no {what}")
        if self._names_of(key) is not None and key in self._all_begun():
            self._removed[key] = None
        self._entries.pop(key, None)

    def __contains__(self, key: object) -> bool:
        if key in self._entries and _is_there(self._entries[key]):
            return True
        return isinstance(key, torch.Tensor) and key not in self._removed and key in self._all_begun()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return f"<optimizer.state of {len(self)} keys>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_torch_has_it, ({key: _plain(self[key]) for key in self},)

    def get(self, key: Any, default: Any = None) -> Any:
        # As defaultdict: only an index makes an entry.
        if key not in self:
            return default
        return self[key]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = {} if default is None else default
        return self[key]

    def pop(self, key: Any, default: Any = _ABSENT) -> Any:
        if key not in self:
            if default is _ABSENT:
                del self[key]
            return default
        entries = _plain(self[key])
        del self[key]
        return entries

    def clear(self) -> None:
        self.replace({})

    def copy(self) -> dict[Any, Any]:
        return _as_torch_has_it({key: self[key] for key in self})

    # Reading

    def _keys(self) -> list[Any]:
        keys: dict[Any, None] = {key: None for key in self._all_begun() if key not in self._removed}
        keys.update({key: None for key, entries in self._entries.items() if _is_there(entries)})
        return list(keys)

    def _names_of(self, key: Any) -> frozenset[str] | None:
        """The names of the service's entries, or None for a key that is no parameter."""
        if not isinstance(key, torch.Tensor):
            return None
        if key not in self._names:
            self._names = self._source.parameters()
        return self._names.get(key)

    def _all_begun(self) -> Mapping[torch.Tensor, None]:
        if self._begun is None:
            self._begun = dict.fromkeys(self._source.begun())
        return self._begun

    def _look(self) -> Mapping[torch.Tensor, dict[str, torch.Tensor]]:
        if self._found is None:
            self._found = self._source.read()
            self._begun = dict.fromkeys(parameter for parameter, tensors in self._found.items() if tensors)
        return self._found

    def _made(self, key: torch.Tensor, own: dict[str, Any], names: frozenset[str]) -> Entries:
        # Deleted and looked at again, a parameter has nothing: it is no look at what the service still has.
        fill = None if self._replaced or key in self._removed else self._fill(key)
        return Entries(own, names=names, fill=fill)

    def _fill(self, key: torch.Tensor) -> Any:
        def fill() -> dict[str, torch.Tensor]:
            # As torch: beside the parameter, but for the count. What the service has is held here; the program gets its own tensors.
            tensors = {
                name: tensor if name == "step" else tensor.to(key.device)
                for name, tensor in self._look().get(key, {}).items()
            }
            self._marks[key] = {name: fingerprint(tensor) for name, tensor in tensors.items()}
            return tensors

        return fill

    # Tensors of earlier steps

    def _remember(self, names: Mapping[torch.Tensor, frozenset[str]]) -> None:
        """The program may still hold tensors that were its state: a change of them would change nothing."""
        for key, entries in self._entries.items():
            if key not in names or (isinstance(entries, Entries) and not entries.looked):
                continue
            for name, value in entries.items():
                if name in names[key] and isinstance(value, torch.Tensor) and not value.is_inference():
                    self._former.append((weakref.ref(value), value._version, name))

    def _check_former(self) -> None:
        alive = [(tensor, version, name) for tensor, version, name in self._former if tensor() is not None]
        self._former = alive
        for reference, version, name in alive:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                self._former = []
                raise RuntimeError(
                    f"a tensor that optimizer.state had as '{name}' before the last step was changed after it: the state is in the "
                    "service, and this is an old copy. Take it from optimizer.state[parameter] again, and change that"
                )


def _is_there(entries: Any) -> bool:
    """An entry that was only looked at is none."""
    if isinstance(entries, Entries):
        return bool(entries.own()) or (entries.looked and bool(entries.service()))
    return True


def _plain(entries: Any) -> Any:
    return dict(entries) if isinstance(entries, Entries) else entries


def _as_torch_has_it(state: Mapping[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(dict, state)
