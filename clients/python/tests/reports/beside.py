"""Situations from public reports: what a program does to an optimizer, done to torch's own and to the service's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from muond.torch import AdamW, Muon, Optimizer
from service import Service

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}
TORCH: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "muon": torch.optim.Muon,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
# torch's Muon orthogonalizes in bfloat16, the service in float32.
TOLERANCE = {"muon": 2e-2}
ALGORITHMS = ("adamw", "muon", "sgd", "rmsprop", "adam")
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.02},
    "adam": {"lr": 0.02},
    "muon": {"lr": 0.05},
    "rmsprop": {"lr": 0.01, "momentum": 0.5},
    "sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25},
}

Params = Iterable[Any]


@dataclass(frozen=True)
class Made:
    """How to make one optimizer twice: ``theirs(params)`` is torch's own, ``ours(params)`` the service's."""

    theirs: Callable[[Params], Any]
    ours: Callable[..., Any]
    tolerance: float

    @property
    def both(self) -> tuple[Callable[[Params], Any], Callable[..., Any]]:
        return self.theirs, self.ours


def made(service: Service, algorithm: str, **hyperparameters: Any) -> Made:
    values = {**HYPERPARAMETERS[algorithm], **hyperparameters}

    def ours(params: Params, **options: Any) -> Optimizer:
        given = {"url": service.url, **EXACT, **options}
        if algorithm == "muon":
            return Muon(params, **values, **given)
        if algorithm == "adamw":
            return AdamW(params, **values, **given)
        listed = list(params)
        groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
        return Optimizer([{**values, "algorithm": algorithm, **group} for group in groups], **given)

    return Made(lambda params: TORCH[algorithm](params, **values), ours, TOLERANCE.get(algorithm, 1e-5))


def model(width: int = 8, seed: int = 0) -> nn.Sequential:
    """Two square matrices, so that the state of one fits the other."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, width, bias=False))


def backward(module: nn.Module, step: int, width: int = 8) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, width, generator=generator), torch.randn(16, width, generator=generator)
    (module(x) - y).square().mean().backward()


def steps(module: nn.Module, optimizer: Any, count: int, first: int = 1) -> None:
    for step in range(first, first + count):
        optimizer.zero_grad()
        backward(module, step)
        optimizer.step()


def apart(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest relative distance of a parameter."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(relative(a, b) for a, b in pairs)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def state_apart(ours: Any, theirs: Any) -> float:
    """The largest relative distance of a tensor of two optimizers' ``state``; the service may have more of them."""
    most = 0.0
    for our_group, their_group in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(our_group["params"], their_group["params"], strict=True):
            for name, value in theirs.state.get(q, {}).items():
                assert name in ours.state[p], name
                most = max(most, relative(torch.as_tensor(ours.state[p][name]), torch.as_tensor(value)))
    return most
