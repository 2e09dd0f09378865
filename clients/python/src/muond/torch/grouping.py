"""From what a user gives to param_groups as torch has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch

from .checks import check_values
from .hyperparameters import DEFAULTS
from .names import plain_name
from .slots import LAYOUT_KEYS

# torch's own keys that every algorithm has; `foreach` and `fused` say how torch computes, not what.
_TORCH_KEYS = ("maximize", "foreach", "fused", "capturable", "differentiable")
# Keys of a group beside its hyperparameters.
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
        *_TORCH_KEYS,
        *("initial_lr", "use_muon"),
    }
)


def resolve_groups(params: Iterable[Any], groups: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """param_groups from ``named_parameters`` and ``groups`` with names or patterns, or those that ``params`` is already."""
    if isinstance(params, torch.Tensor):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
            + torch.typename(params)
        )
    given = list(params.named_parameters() if isinstance(params, torch.nn.Module) else params)
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
    """A param_group with every hyperparameter of its algorithm, and the other keys that it has. Raises ValueError, TypeError.

    ``defaults`` are those of the optimizer, and hold for groups of its own algorithm.
    """
    group = _with_algorithm(group)
    own = defaults.get("algorithm")
    algorithm = group.get("algorithm", own)
    if algorithm not in DEFAULTS:
        raise ValueError(f"a param_group has the algorithm {algorithm!r}, expected one of {', '.join(DEFAULTS)}")
    inherited = defaults if algorithm == own else {key: defaults[key] for key in _TORCH_KEYS if key in defaults}
    known = {**DEFAULTS[algorithm], **inherited}
    _warn_of_misspellings(group, algorithm)
    complete = {**known, **group, "algorithm": algorithm}
    check_values(complete)
    complete["params"] = _named_plainly(group["params"])
    return complete


# github.com/KellerJordan/Muon, MuonWithAuxAdam: `use_muon` says which of the two a group gets, with these values of its own.
_KELLER_JORDAN: Mapping[bool, Mapping[str, Any]] = {
    True: {"algorithm": "muon", "lr": 0.02, "momentum": 0.95, "weight_decay": 0.0},
    False: {"algorithm": "adamw", "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0},
}


def _with_algorithm(group: Mapping[str, Any]) -> Mapping[str, Any]:
    if "use_muon" not in group or "algorithm" in group:
        return group
    return {**_KELLER_JORDAN[bool(group["use_muon"])], **group}


def _warn_of_misspellings(group: Mapping[str, Any], algorithm: str) -> None:
    """Other tools have keys of their own in param_groups, which torch keeps and ignores. One that is nearly ours may be a mistake."""
    known = [*DEFAULTS[algorithm], *_OTHER_KEYS]
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        meant = get_close_matches(key, known, n=1, cutoff=0.85)
        if meant:
            warnings.warn(
                f"a param_group of {algorithm} has the key '{key}', which changes nothing: is it '{meant[0]}'?",
                stacklevel=5,
            )


def _named_plainly(params: Any) -> Any:
    if isinstance(params, (torch.Tensor, set)):
        return params
    return [(plain_name(entry[0]), entry[1]) if isinstance(entry, tuple) else entry for entry in params]


def common_values(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What schedulers ask an optimizer of groups with values of their own for: the keys that all have, with the first one's values."""
    shared = set.intersection(*({*DEFAULTS[group["algorithm"]]} for group in groups))
    return {key: value for key, value in groups[0].items() if key in shared}


def with_names(group: Mapping[str, Any]) -> list[Any]:
    """The parameters of a group as they were given: with their names, if they have some."""
    names = group.get("param_names")
    return list(group["params"]) if names is None else list(zip(names, group["params"], strict=True))
