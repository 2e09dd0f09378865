"""The entries of one parameter in ``optimizer.state``."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any


class Entries(dict[str, Any]):
    """A dict of the program's own entries, which has the service's tensors as well from the first look on.

    ``names``: those of the service's entries. ``fill`` reads them; without it this is a plain dict.
    """

    def __init__(
        self, values: Any = (), /, *, names: frozenset[str] = frozenset(), fill: Any = None, **more: Any
    ) -> None:
        super().__init__(values, **more)
        self._names = names
        self._fill = fill

    @property
    def looked(self) -> bool:
        """Whether the service's tensors are among the entries."""
        return self._fill is None

    def own(self) -> dict[str, Any]:
        """The program's own entries; nothing is read for them."""
        return {name: dict.__getitem__(self, name) for name in dict.__iter__(self) if name not in self._names}

    def service(self) -> dict[str, Any]:
        """What the program sees of the service's entries."""
        return {name: dict.__getitem__(self, name) for name in dict.__iter__(self) if name in self._names}

    def forget(self, fill: Any) -> None:
        """The state has moved: the tensors are read again by the next look."""
        for name in self.service():
            dict.__delitem__(self, name)
        self._fill = fill

    def _look(self) -> None:
        if self._fill is None:
            return
        tensors = self._fill()
        self._fill = None
        dict.update(self, tensors)

    def __missing__(self, key: str) -> Any:
        if self._fill is None or key not in self._names:
            raise KeyError(key)
        self._look()
        return dict.__getitem__(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._names:
            self._look()
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        self._look()
        dict.__delitem__(self, key)

    def __contains__(self, key: object) -> bool:
        self._look()
        return dict.__contains__(self, key)

    def __iter__(self) -> Iterator[str]:
        self._look()
        return dict.__iter__(self)

    def __len__(self) -> int:
        self._look()
        return dict.__len__(self)

    def __eq__(self, other: object) -> bool:
        self._look()
        return dict.__eq__(self, other)

    __hash__ = None

    def __repr__(self) -> str:
        self._look()
        return dict.__repr__(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return ValuesView(self)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        self._look()
        return dict.pop(self, key, *default)

    def popitem(self) -> tuple[str, Any]:
        self._look()
        return dict.popitem(self)

    def clear(self) -> None:
        self._look()
        dict.clear(self)

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def update(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), /, **more: Any) -> None:  # type: ignore[override]
        for key, value in {**dict(values), **more}.items():
            self[key] = value
