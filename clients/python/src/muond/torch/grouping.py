"""From what a user gives to param_groups as torch has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from .hyperparameters import DEFAULTS
from .names import plain_name
from .slots import LAYOUT_KEYS

# Keys of a group beside its hyperparameters. torch's `foreach` and `fused` say how torch computes, not what.
_OTHER_KEYS = frozenset(
    {
        *(
            "params",
            "param_names",
            "name",
            "algorithm",
            "preset",
            "gradient_dtype",
            "update_dtype",
            "layouts",
            *LAYOUT_KEYS,
        ),
        *("maximize", "foreach", "fused", "capturable", "differentiable", "initial_lr"),
    }
)


def resolve_groups(params: Iterable[Any], groups: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """param_groups from ``named_parameters`` and ``groups`` with names or patterns, or those that ``params`` is already."""
    given = list(params)
    if groups is None:
        if all(isinstance(group, dict) for group in given):
            return given
        raise ValueError(
            "which parameters get which algorithm? Give groups=, for example groups=muond.torch.suggest(model)"
        )
    named: dict[str, torch.Tensor] = {}
    for entry in given:
        if not isinstance(entry, tuple):
            raise TypeError(
                f"with groups= the parameters are model.named_parameters(), this one is a {type(entry).__name__}"
            )
        named[plain_name(entry[0])] = entry[1]
    resolved = [_resolve(group, named) for group in groups]
    _check_cover(named, resolved)
    return resolved


def _resolve(group: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    if "params" in group:
        return dict(group)
    patterns = group.get("parameters")
    if patterns is None:
        raise ValueError(f"group {group.get('name')!r} has neither 'parameters' (names or patterns) nor 'params'")
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in listed:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"group {group.get('name')!r} has '{pattern}', which is the name of no parameter")
    params = [pair for pair in named.items() if any(pair[0] == p or fnmatchcase(pair[0], p) for p in listed)]
    return {**{key: value for key, value in group.items() if key != "parameters"}, "params": params}


def _check_cover(named: Mapping[str, torch.Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
    listed = [pair[0] if isinstance(pair, tuple) else None for group in groups for pair in group["params"]]
    for name in named:
        if listed.count(name) != 1:
            raise ValueError(f"parameter '{name}' is in {listed.count(name)} groups, expected 1")


def complete_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A param_group with every hyperparameter of its algorithm. Raises ValueError, naming the key."""
    algorithm = group.get("algorithm", defaults.get("algorithm"))
    if algorithm not in DEFAULTS:
        raise ValueError(f"a param_group has the algorithm {algorithm!r}, expected one of {', '.join(DEFAULTS)}")
    known = {**DEFAULTS[algorithm], **{key: defaults[key] for key in DEFAULTS[algorithm] if key in defaults}}
    for key in group:
        if key not in known and key not in _OTHER_KEYS:
            raise ValueError(f"{algorithm} has no hyperparameter '{key}', it has {', '.join(known)}")
    for key in ("capturable", "differentiable"):
        if group.get(key) or defaults.get(key):
            raise ValueError(f"{key}=True is not possible: the step is computed by a service")
    complete = {**known, **group, "algorithm": algorithm}
    _check_values(complete)
    complete["params"] = _without_duplicates(group["params"])
    return complete


def _check_values(group: Mapping[str, Any]) -> None:
    """What torch's constructors check; all the rest is the service's to refuse."""
    for key in ("lr", "weight_decay", "eps"):
        value = group.get(key, 0.0)
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"{key} is a tensor of shape {list(value.shape)}, expected one element")
        if not 0.0 <= float(value) < float("inf"):
            raise ValueError(f"{key} is {float(value)}, expected 0 or more")


def _without_duplicates(params: Any) -> Any:
    if isinstance(params, (torch.Tensor, set)):
        return params
    listed = list(params)
    seen: set[int] = set()
    for entry in listed:
        name, tensor = entry if isinstance(entry, tuple) else (None, entry)
        if id(tensor) in seen:
            raise ValueError(
                f"a parameter{f' ({name})' if name else ''} is there twice: tied weights are one parameter"
            )
        seen.add(id(tensor))
    return [(plain_name(entry[0]), entry[1]) if isinstance(entry, tuple) else entry for entry in listed]
