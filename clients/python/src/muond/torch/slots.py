"""The parameters of an optimizer as a run has them: one slot each, in the order of the param_groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..declaration import Parameter
from .hyperparameters import hyperparameters
from .settings import Settings, wire_dtype
from .shards import Shard, like_shard, local, shard_of

LAYOUT_KEYS = ("split", "heads", "matrices")
_MATRICES = ("muon", "muonclip")


@dataclass(frozen=True)
class Part:
    """What each process sends of a parameter that all of them have whole: ``bounds[r]`` to ``bounds[r + 1]`` of its elements."""

    bounds: tuple[int, ...]
    rank: int
    """That of this process."""

    @property
    def range(self) -> tuple[int, int]:
        """The elements of this process."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]

    def size(self, rank: int) -> int:
        """How many elements a process has."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def of(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The elements of a process, in the tensor's own memory: all of it as it is, else as a vector."""
        if self.size(rank) == tensor.numel():
            return tensor
        # A tensor that does not lie one element after the other is no vector; it has one owner.
        if self.size(rank) == 0:  # pragma: no cover - in processes of several ranks, which are not measured
            return tensor.new_empty(0)
        return tensor.view(-1)[
            self.bounds[rank] : self.bounds[rank + 1]
        ]  # pragma: no cover - in processes of several ranks, which are not measured


@dataclass(frozen=True)
class Slot:
    """A parameter of the model and what the run knows it as.

    ``index`` is its place in the run, ``group`` that of its param_group; ``shape`` is that of the time when the run was opened, of
    the whole parameter where it is sharded.
    """

    index: int
    group: int
    name: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    declaration: Parameter
    shard: Shard | None = None
    part: Part | None = None

    @property
    def local(self) -> torch.Tensor:
        """The weights that this rank sends gradients of and applies updates to."""
        if self.part is not None:
            return self.part.of(self.tensor.detach(), self.part.rank)
        return self.tensor if self.shard is None else local(self.tensor)

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient of these weights."""
        gradient = self.tensor.grad
        if gradient is not None and self.part is not None:
            # One that is laid out otherwise than its parameter is copied, where this rank has a part of it.
            whole = self.part.size(self.part.rank) in (0, gradient.numel())
            return self.part.of(gradient if whole else gradient.contiguous(), self.part.rank)
        return gradient if gradient is None or self.shard is None else local(gradient)


def sharded_as(slot: Slot, entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What has the shape of a sharded parameter, sharded as that is; counts, and what has one number for each row, whole."""
    if slot.shard is None:
        return entries
    return {name: like_shard(t, slot.tensor) if t.shape == slot.shape else t for name, t in entries.items()}


def make_slots(
    groups: Sequence[Mapping[str, Any]],
    settings: Settings,
    wanted: Callable[[torch.Tensor], bool] = lambda _: True,
    known: Sequence[Slot] = (),
) -> list[Slot]:
    """The slots of the parameters that are ``wanted`` and have elements; every one is checked.

    A parameter without a name keeps the one it has in ``known``. Raises ValueError and TypeError for what no run can have; both
    name the parameter.
    """
    slots: list[Slot] = []
    used: set[str] = set()
    # torch warns of a parameter that a group lists twice, and takes it.
    listed: set[int] = set()
    names = iter(_names(groups, known))
    for number, (group, group_name) in enumerate(zip(groups, group_names(groups), strict=True)):
        for tensor in group["params"]:
            name = next(names)
            layout = _layout(name, group, settings, used)
            shard = shard_of(name, tensor)
            declaration = _declare(name, tensor, group, group_name, layout, settings)
            if shard is not None:
                declaration = replace(declaration, ranges=shard.ranges)
            if wanted(tensor) and tensor.numel() > 0 and id(tensor) not in listed:
                listed.add(id(tensor))
                slots.append(Slot(len(slots), number, name, tensor, tuple(tensor.shape), declaration, shard))
    _check_layouts(settings, used)
    return slots


def _names(groups: Sequence[Mapping[str, Any]], known: Sequence[Slot]) -> list[str]:
    """A name for each parameter, once: two models in one optimizer may have names alike."""
    before = {id(slot.tensor): slot.name for slot in known}
    # As an ordered set.
    taken: dict[str, None] = {}
    position = 0
    for group in groups:
        given = group.get("param_names")
        named = given if given is not None and len(given) == len(group["params"]) else None
        for i, tensor in enumerate(group["params"]):
            base = named[i] if named else before.get(id(tensor), f"param.{position}")
            name, number = base, 2
            while name in taken:
                name, number = f"{base}.{number}", number + 1
            taken[name] = None
            position += 1
    return list(taken)


def group_names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each group on the wire: its own, or its algorithm's, with a number where that is taken."""
    names: list[str] = []
    for group in groups:
        name = base = str(group.get("name") or group["algorithm"])
        number = 2
        while name in names:
            name, number = f"{base}.{number}", number + 1
        names.append(name)
    return names


def group_declarations(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as ``open`` takes them."""
    return [
        {
            "name": name,
            "algorithm": group["algorithm"],
            **({"preset": group["preset"]} if group.get("preset") is not None else {}),
            **hyperparameters(group),
        }
        for name, group in zip(group_names(groups), groups, strict=True)
    ]


def attention_declarations(attentions: Sequence[Mapping[str, Any]], slots: Sequence[Slot]) -> list[dict[str, Any]]:
    """Attentions with each parameter by its index: it may be given as a name, as the tensor, or as (either, first_row)."""
    rows = ("query", "key", "query_bias", "key_bias")
    return [
        {
            key: _rows(value, f"{attention.get('name')}.{key}", slots) if key in rows else value
            for key, value in attention.items()
        }
        for attention in attentions
    ]


def _rows(value: Any, where: str, slots: Sequence[Slot]) -> dict[str, int]:
    if isinstance(value, tuple):
        parameter, first_row = value
    elif isinstance(value, Mapping):
        parameter, first_row = value["parameter"], value.get("first_row", 0)
    else:
        parameter, first_row = value, 0
    for slot in slots:
        if slot.tensor is parameter or (isinstance(parameter, str) and slot.name == parameter):
            return {"parameter": slot.index, "first_row": int(first_row)}
    what = repr(parameter) if isinstance(parameter, str) else f"a {type(parameter).__name__}"
    raise ValueError(f"attention {where} names {what}, which is no parameter of this optimizer")


def _layout(name: str, group: Mapping[str, Any], settings: Settings, used: set[str]) -> dict[str, Any]:
    layout = {key: group[key] for key in LAYOUT_KEYS if group.get(key) is not None}
    for pattern, keys in {**settings.layouts, **group.get("layouts", {})}.items():
        if name == pattern or fnmatchcase(name, pattern):
            used.add(pattern)
            layout.update(keys)
    for key in layout:
        if key not in LAYOUT_KEYS:
            raise ValueError(f"the layout of '{name}' has the key '{key}', expected {', '.join(LAYOUT_KEYS)}")
    return layout


def _declare(
    name: str,
    tensor: torch.Tensor,
    group: Mapping[str, Any],
    group_name: str,
    layout: Mapping[str, Any],
    settings: Settings,
) -> Parameter:
    algorithm = group["algorithm"]
    _check_tensor(name, tensor)
    if algorithm in _MATRICES:
        _check_matrix(name, tensor, algorithm, layout)
    gradient, update = (group.get(key) or getattr(settings, key) for key in ("gradient_dtype", "update_dtype"))
    split = layout.get("split")
    return Parameter(
        name=name,
        group=group_name,
        shape=tuple(tensor.shape),
        gradient_dtype=wire_dtype("gradient_dtype", gradient, tensor),
        update_dtype=wire_dtype("update_dtype", update, tensor),
        split=None if split is None else [int(rows) for rows in split],
        heads=layout.get("heads"),
        matrices=layout.get("matrices"),
    )


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    refusals: Sequence[tuple[Callable[[], bool], str]] = (
        (lambda: tensor.is_complex(), f"is {tensor.dtype}: muond has no complex parameters"),
        (lambda: not tensor.is_floating_point(), f"is {tensor.dtype}, expected a floating point dtype"),
        (lambda: tensor.layout != torch.strided, f"is {tensor.layout}, expected a dense tensor"),
        (lambda: tensor.is_meta, "is on the meta device: it has no values yet"),
    )
    for holds, why in refusals:
        if holds():
            raise ValueError(f"parameter '{name}' {why}")


def _check_matrix(name: str, tensor: torch.Tensor, algorithm: str, layout: Mapping[str, Any]) -> None:
    shape = list(tensor.shape)
    if len(shape) < 2:
        raise ValueError(
            f"Muon only supports 2D parameters: parameter '{name}' has shape {shape}, {algorithm} is for matrices: "
            "give it to AdamW (see muond.torch.suggest)"
        )
    if len(shape) > 2 and "matrices" not in layout:
        raise ValueError(
            f"Muon only supports 2D parameters: parameter '{name}' has shape {shape}: say which matrices these are, "
            f"layouts={{'{name}': {{'matrices': 'flatten'}}}} for a convolution, 'batch' for matrices side by side (experts)"
        )


def _check_layouts(settings: Settings, used: set[str]) -> None:
    for pattern in settings.layouts:
        if pattern not in used:
            raise ValueError(
                f"layouts has '{pattern}', which is the name of no parameter: is it model.named_parameters() that was given?"
            )
