"""What torch's constructors check of a param_group, in torch's words. All the rest is the service's to refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .hyperparameters import plain

Group = Mapping[str, Any]

_MUON_ADJUST = (None, "original", "match_rms_adamw", "spectral_unclamped", "spectral", "none")
# torch divides by the norm, but at least by eps; the service divides by the norm however small it is, and a zero matrix stays zero.
# Up to here the two differ for no gradient that a training has.
_MOST_EPS = 1e-6


def check_values(group: Group) -> None:
    """Raises ValueError and TypeError for values that torch's optimizer of this algorithm refuses, or this package cannot have."""
    for key in ("capturable", "differentiable"):
        if group.get(key):
            raise ValueError(f"{key}=True is not possible: the step is computed by a service")
    _check_tensor_rate(group)
    _CHECKS[group["algorithm"]](group)


def _check_tensor_rate(group: Group) -> None:
    lr = group.get("lr")
    if lr is None:
        raise TypeError("lr is None, expected a number")
    if isinstance(lr, torch.Tensor):
        if group.get("foreach"):
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")


def _check_muon(group: Group) -> None:
    for key, words in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
        _require(group, key, 0.0, f"{words} should be >= 0 but is: ")
    adjust = group["adjust_lr_fn"]
    if adjust not in _MUON_ADJUST and not str(adjust).startswith("rms:"):
        raise ValueError(f"Adjust learning rate function {adjust} is not supported")
    if not 0.0 <= float(plain(group["eps"])) <= _MOST_EPS:
        raise ValueError(
            f"eps is {group['eps']}, expected 0 to {_MOST_EPS}: the service divides by the norm of the momentum itself, so that a "
            "floor that is ever reached would be another optimizer"
        )


def _check_adam(group: Group) -> None:
    _require(group, "lr", 0.0, "Invalid learning rate: ")
    _require(group, "eps", 0.0, "Invalid epsilon value: ")
    betas = group["betas"]
    for index in (0, 1):
        if not 0.0 <= float(plain(betas[index])) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {betas[index]}")
    _require(group, "weight_decay", 0.0, "Invalid weight_decay value: ")
    tensors = [isinstance(beta, torch.Tensor) for beta in betas]
    if any(tensors) and not all(tensors):
        raise ValueError("betas must be either both floats or both Tensors")
    if tensors[0] and group.get("foreach"):
        raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")


def _check_rmsprop(group: Group) -> None:
    if group["centered"]:
        raise ValueError("centered=True is not possible: the service has no centered RMSprop")
    for key, words in (
        ("lr", "learning rate: "),
        ("eps", "epsilon value: "),
        ("momentum", "momentum value: "),
        ("weight_decay", "weight_decay value: "),
        ("alpha", "alpha value: "),
    ):
        _require(group, key, 0.0, f"Invalid {words}")


def _check_sgd(group: Group) -> None:
    _require(group, "lr", 0.0, "Invalid learning rate: ")
    _require(group, "momentum", 0.0, "Invalid momentum value: ")
    _require(group, "weight_decay", 0.0, "Invalid weight_decay value: ")
    if group["nesterov"] and (plain(group["momentum"]) <= 0 or plain(group["dampening"]) != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def _require(group: Group, key: str, least: float, words: str) -> None:
    value = group[key]
    if value is None:
        raise TypeError(f"{key} is None, expected a number")
    if not least <= float(plain(value)) < math.inf:
        raise ValueError(f"{words}{value}")


_CHECKS: Mapping[str, Callable[[Group], None]] = {
    "muon": _check_muon,
    "muonclip": _check_muon,
    "adamw": _check_adam,
    "adam": _check_adam,
    "rmsprop": _check_rmsprop,
    "sgd": _check_sgd,
}
