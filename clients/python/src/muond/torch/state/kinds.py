"""Which state each algorithm has, under torch's names, and what of it may be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .fingerprint import on_host

_NAMES: Mapping[str, Sequence[str]] = {
    "muon": ("momentum_buffer",),
    "muonclip": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg", "momentum_buffer"),
    "sgd": ("momentum_buffer",),
}
# The bias corrections of these take the count of steps; the others compute the same whatever it is.
_COUNTING = frozenset({"adamw", "adam"})
# torch's own optimizers leave this out while momentum is 0.
_OPTIONAL = {"rmsprop": "momentum_buffer", "sgd": "momentum_buffer"}


def state_names(group: Mapping[str, Any]) -> frozenset[str]:
    """The names of the service's entries for a parameter of a param_group; every other entry is the program's own."""
    more = [
        *(["max_exp_avg_sq"] if group.get("amsgrad") else []),
        *(["second_momentum"] if group.get("second_momentum", "none") != "none" else []),
    ]
    return frozenset({"step", *_NAMES[group["algorithm"]], *more})


def complete_entries(
    parameter: str, shape: Sequence[int], group: Mapping[str, Any], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """What the service is given for ``entries`` of a parameter, whoever made them; ``{"step": 0}`` is no state.

    Raises ValueError for a state that torch could not go on from either, and for a count of 0 beside averages.
    """
    names = state_names(group) - {"step"}
    algorithm = group["algorithm"]
    given = {name: entries[name] for name in names if entries.get(name) is not None}
    step = _count(parameter, entries.get("step"))
    if not given and (algorithm not in _COUNTING or not step):
        return {"step": 0}
    if _OPTIONAL.get(algorithm) in names - given.keys():
        given[_OPTIONAL[algorithm]] = torch.zeros(tuple(shape), device="cpu")
    lacking = sorted(names - given.keys())
    if algorithm in _COUNTING and step is None:
        lacking.append("step")
    if lacking:
        raise ValueError(
            f"the state of parameter '{parameter}' has {_listed(given)} but no {_listed(lacking)}: {algorithm} needs all of it, or none"
        )
    # SGD's first step is another one than that of a buffer of zeros.
    if step == 0 and algorithm != "sgd" and not any(bool(torch.any(on_host(value))) for value in given.values()):
        return {"step": 0}
    if step == 0 and algorithm in _COUNTING:
        raise ValueError(
            f"the state of parameter '{parameter}' has step 0 and {_listed(given)} that are not zero: "
            "set step to 1 or more, or the averages to zero"
        )
    return {"step": step or 1, **given}


def _count(parameter: str, step: Any) -> int | None:
    if step is None:
        return None
    value = float(step)
    if value < 0 or value != int(value):
        raise ValueError(f"the state of parameter '{parameter}' has step {value}, expected an integer of 0 or more")
    return int(value)


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "no tensor"
