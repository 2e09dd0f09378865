"""The same training with torch.optim and with the service: the losses, the weights and the state agree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import Gpt, batches, distance, gpt, matrices, net, train

import muond.torch
from muond.torch import AdamW, Muon, Optimizer, suggest
from service import Service

STEPS = 200
WARM_UP = 20


def warm_up_then_decay(step: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / STEPS)


def gpt_losses(model: Gpt, *optimizers: torch.optim.Optimizer) -> list[float]:
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_decay) for optimizer in optimizers]
    losses = []
    for batch in itertools.islice(batches(), STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    return losses


def split(model: Gpt) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    groups = suggest(model, quiet=True)
    return tuple([p for _, p in group["params"]] for group in groups)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def local() -> tuple[list[float], torch.optim.Muon]:
    model = gpt()
    hidden, rest = split(model)
    muon = torch.optim.Muon(hidden, lr=0.02)
    return gpt_losses(model, muon, torch.optim.AdamW(rest, lr=3e-3)), muon


@pytest.mark.parametrize("overlap", [False, True])
def test_losses_of_a_gpt_agree_within_a_hundredth_over_200_steps(
    shared: Service, local: tuple[list[float], torch.optim.Muon], name: str, overlap: bool
) -> None:
    model = gpt()
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=shared.url, run=name, overlap=overlap) as optimizer:
        losses = gpt_losses(model, optimizer)
    furthest = max(abs(a - b) / b for a, b in zip(losses[WARM_UP:], local[0][WARM_UP:], strict=True))
    assert furthest < 0.01
    assert losses[-1] < 0.75 * losses[0]


def test_two_optimizers_of_one_model_are_two_runs(
    shared: Service, local: tuple[list[float], torch.optim.Muon], name: str
) -> None:
    model = gpt()
    hidden, rest = split(model)
    with (
        Muon(hidden, lr=0.02, url=shared.url, run=f"{name}-muon") as muon,
        AdamW(rest, lr=3e-3, url=shared.url, run=f"{name}-adamw") as adamw,
    ):
        losses = gpt_losses(model, muon, adamw)
        furthest = max(abs(a - b) / b for a, b in zip(losses[WARM_UP:], local[0][WARM_UP:], strict=True))
        assert furthest < 0.01


EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_direction_of_adamw_in_float32_is_torchs_within_1e_6(shared: Service, name: str, amsgrad: bool) -> None:
    ours, theirs = torch.zeros(50, 40, requires_grad=True), torch.zeros(50, 40, requires_grad=True)
    reference = torch.optim.AdamW([theirs], lr=1e-2, amsgrad=amsgrad)
    furthest = 0.0
    with AdamW([ours], lr=1e-2, amsgrad=amsgrad, url=shared.url, run=name, **EXACT) as optimizer:
        for step in range(1, 41):
            gradient = torch.randn(50, 40, generator=torch.Generator().manual_seed(step))
            for weights, each in ((ours, optimizer), (theirs, reference)):
                # From zero, what a step leaves is the direction times the learning rate.
                weights.detach().zero_()
                weights.grad = gradient.clone()
                each.step()
            furthest = max(furthest, float((ours.detach() - theirs.detach()).abs().max()) / 1e-2)
    assert furthest < 1e-6


def test_weights_of_adamw_in_float32_stay_together(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), 60)
    with AdamW(ours.parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        train(ours, optimizer, 60)
    assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_momentum_buffer_is_torchs_within_the_rounding_of_its_gradients(
    shared: Service, name: str, dtype: Any
) -> None:
    model = net()
    pairs = matrices(model)
    twins = [p.detach().clone().requires_grad_() for _, p in pairs]
    reference = torch.optim.Muon(twins, lr=0.02)
    with Muon(pairs, lr=0.02, url=shared.url, run=name, gradient_dtype=dtype) as optimizer:
        for step in range(1, 21):
            generator = torch.Generator().manual_seed(step)
            for (_, p), twin in zip(pairs, twins, strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                twin.grad = p.grad.clone()
            optimizer.step()
            reference.step()
        state = optimizer.state_dict()["state"]
    for index, twin in enumerate(twins):
        ours, theirs = state[index]["momentum_buffer"], reference.state[twin]["momentum_buffer"]
        assert state[index]["step"] == 20
        assert ours.dtype == torch.float32
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < (5e-7 if dtype == "float32" else 2**-9)


def test_one_update_of_muon_is_closer_to_float64_than_torchs(shared: Service, name: str) -> None:
    torch.manual_seed(3)
    gradient = torch.randn(96, 64)
    start = torch.zeros(96, 64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    torch.optim.Muon([theirs], lr=1.0).step()
    with Muon([ours], lr=1.0, url=shared.url, run=name, **EXACT) as optimizer:
        optimizer.step()
    left, sigma, right = torch.linalg.svd(gradient.double() / gradient.double().norm(), full_matrices=False)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
    exact = -((96 / 64) ** 0.5) * (left * sigma) @ right
    distances = [float((w.detach().double() - exact).norm() / exact.norm()) for w in (ours, theirs)]
    assert distances[0] < 1e-5
    assert distances[0] < distances[1] < 3e-2


def test_the_state_loads_into_torchs_own_optimizer(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    with AdamW(ours.parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        train(ours, optimizer, 10)
        saved = optimizer.state_dict()
    train(theirs, reference, 10)
    handed_over = net()
    handed_over.load_state_dict(ours.state_dict())
    local = torch.optim.AdamW(handed_over.parameters(), lr=5)
    local.load_state_dict(saved)
    train(handed_over, local, 10, 11)
    train(theirs, reference, 10, 11)
    assert distance(handed_over, theirs) < 1e-5
    assert muond.torch.state.matching.TOKEN not in local.state_dict()
