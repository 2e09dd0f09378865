"""Hyperparameters between torch's param_groups and the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

_MUON: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": (3.4445, -4.775, 2.0315),
    "eps": 1e-7,
    "ns_steps": 5,
    "adjust_lr_fn": None,
    "momentum_form": "ema",
    "momentum_dtype": "float32",
    "second_momentum": "none",
    "beta2": 0.95,
}
_ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "muon": _MUON,
    "muonclip": {**_MUON, "momentum_form": "heavy_ball", "adjust_lr_fn": "match_rms_adamw"},
    "adamw": {**_ADAM, "weight_decay": 1e-2},
    "adam": _ADAM,
    "rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False},
    "sgd": {"lr": 1e-3, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
}
"""Every hyperparameter of each algorithm, by its name on the wire, with torch's default."""

FIXED = frozenset({"amsgrad", "centered", "momentum_form", "momentum_dtype", "second_momentum"})
"""What a run cannot change: it is part of its state."""

COUPLED = frozenset({"adam", "rmsprop"})
"""Their weight decay is added to the gradient, as in torch: by this package, which has the weights."""

# torch's names for what the wire calls otherwise.
_ADJUST = {None: "original", "spectral_unclamped": "spectral"}


# torch writes None for a default of its own; for anything else it is a mistake.
_MAY_BE_NONE = frozenset({"adjust_lr_fn", "ns_steps"})


def on_the_wire(name: str, value: Any) -> Any:
    """A value of a param_group as the service takes it. Raises TypeError for None where no None is possible."""
    if value is None and name not in _MAY_BE_NONE:
        raise TypeError(f"{name} is None, expected a value")
    if name == "adjust_lr_fn":
        return _ADJUST.get(value, value)
    return plain(value)


def plain(value: Any) -> Any:
    """Python's own numbers and lists: schedulers write tensors and numpy's numbers, torch tuples, configurations lists of their own."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            raise ValueError(f"a hyperparameter is a tensor of shape {list(value.shape)}, expected one element")
        return value.item() if value.size == 1 or isinstance(value, torch.Tensor) else plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the service is told of a param_group; other keys of it belong to torch and to other tools. None: its own default."""
    values = {name: on_the_wire(name, group[name]) for name in DEFAULTS[group["algorithm"]]}
    if group["algorithm"] in COUPLED:
        values["weight_decay"] = 0.0
    return {name: value for name, value in values.items() if value is not None}


def changes(group: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What has changed against ``known``, the hyperparameters in force. Raises ValueError for what cannot change."""
    wanted = {name: value for name, value in hyperparameters(group).items() if known.get(name) != value}
    for name in FIXED & wanted.keys():
        raise ValueError(f"{name} of a group was {known.get(name)!r} and is {wanted[name]!r}: a run cannot change it")
    return wanted
