"""Every scheduler of torch.optim.lr_scheduler changes the service's hyperparameters as it changes torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import distance, loss_of, net
from torch.optim import lr_scheduler

from muond.torch import AdamW, MuonClip
from service import Service

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}
STEPS = 12


def in_sequence(optimizer: torch.optim.Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.3),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    # These two change AdamW's betas as well.
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS + 1),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
    "SequentialLR": in_sequence,
    "ChainedScheduler": chained,
}


def scheduled(model: torch.nn.Module, optimizer: torch.optim.Optimizer, make: Callable[..., Any]) -> list[Any]:
    """Trains and returns what the group had in every step."""
    schedule = make(optimizer)
    had = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        had.append((float(optimizer.param_groups[0]["lr"]), tuple(optimizer.param_groups[0]["betas"])))
        optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            # A measure of its own: losses that differ by a rounding must not decide.
            schedule.step(1 / step)
        else:
            schedule.step()
    return had


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_does_to_the_service_what_it_does_to_torch(shared: Service, name: str, kind: str) -> None:
    ours, theirs = net(), net()
    expected = scheduled(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), SCHEDULERS[kind])
    told: list[Any] = []

    def note(receipt: Any) -> None:
        group = receipt.groups["adamw"]
        told.append((group["lr"], tuple(group["betas"])))

    with AdamW(ours.parameters(), lr=1e-2, url=shared.url, run=name, callback=note, **EXACT) as optimizer:
        scheduled(ours, optimizer, SCHEDULERS[kind])
    assert told == expected
    assert len({lr for lr, _ in told}) > 1
    assert distance(ours, theirs) < 1e-5


def test_one_cycle_turns_the_momentum_of_muon(shared: Service, name: str) -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    told, wanted = [], []
    with MuonClip(model.named_parameters(), url=shared.url, run=name) as optimizer:
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=5, base_momentum=0.8, max_momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(1, 8)).square().sum().backward()
            told.append(optimizer.step().groups["muonclip"]["momentum"])
            wanted.append(optimizer.param_groups[0]["momentum"])
            schedule.step()
    assert told == wanted
    assert (told[0], len(set(told))) == (0.9, 4)
