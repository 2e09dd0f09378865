"""The form of a state_dict: parameters are numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def packed(groups: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """The param_groups of a state_dict, with a number for each parameter, and {id of a parameter: its number}."""
    number_of: dict[int, int] = {}
    rows: list[dict[str, Any]] = []
    first = 0
    for group in groups:
        for number, parameter in enumerate(group["params"], first):
            number_of.setdefault(id(parameter), number)
        first += len(group["params"])
        numbers = [number_of[id(parameter)] for parameter in group["params"]]
        rows.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
    return rows, number_of


def in_order(entries: Mapping[Any, Any], number_of: Mapping[int, int]) -> list[tuple[Any, Any]]:
    """By number; what belongs to a parameter that no group has any more is left out, and keys of the program's own come last."""
    numbered = [
        (key, value) for key, value in entries.items() if isinstance(key, torch.Tensor) and id(key) in number_of
    ]
    others = [(key, value) for key, value in entries.items() if not isinstance(key, torch.Tensor)]
    return [*sorted(numbered, key=lambda pair: number_of[id(pair[0])]), *others]
