"""What trainers do, with gradients and updates in shared memory: the bits of the socket, whatever is around the step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import net
from torch import nn
from torch.utils.data import DataLoader, Dataset

from muond.torch import AdamW, Muon
from service import Service

Work = Callable[[nn.Module, AdamW], None]
STEPS = 4


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 6, generator=generator)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    inputs, targets = data(seed)
    return torch.nn.functional.mse_loss(model(inputs), targets)


def adamw(model: nn.Module, service: Service, run: str, transport: str) -> AdamW:
    return AdamW(model.named_parameters(), lr=1e-2, url=service.url, run=run, transport=transport)  # type: ignore[arg-type]


def same_bits(service: Service, name: str, work: Work) -> None:
    """Does the same work over shared memory and over the socket, and holds the results against each other."""
    outcomes = []
    for transport in ("shm", "websocket"):
        model = net()
        with adamw(model, service, f"{name}-{transport}", transport) as optimizer:
            work(model, optimizer)
            assert optimizer.run.transport == transport
            outcomes.append((optimizer.run.step_count, optimizer.run.digest, [p.detach() for p in model.parameters()]))
    (steps, digest, weights), (other_steps, other_digest, other_weights) = outcomes
    assert (steps, digest) == (other_steps, other_digest)
    assert steps > 0
    for one, two in zip(weights, other_weights, strict=True):
        assert torch.equal(one, two)


# inductor writes C++, and warns of things that are its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_model_trains_in_shared_memory(shared: Service, name: str) -> None:
    def work(model: nn.Module, optimizer: AdamW) -> None:
        compiled: Any = torch.compile(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(compiled, step).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    same_bits(shared, name, work)


def test_a_gradient_scaler_unscales_and_skips_in_shared_memory(shared: Service, name: str) -> None:
    def work(model: nn.Module, optimizer: AdamW) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for step in range(STEPS):
            optimizer.zero_grad()
            factor = float("inf") if step == 1 else 1.0
            scaler.scale(loss_of(model, step) * factor).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 8.0, "the step that was skipped"
        assert optimizer.run.step_count == STEPS - 1

    same_bits(shared, name, work)


def test_gradients_are_accumulated_before_they_go_to_shared_memory(shared: Service, name: str) -> None:
    def work(model: nn.Module, optimizer: AdamW) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(3):
                (loss_of(model, 10 * step + part) / 3).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    same_bits(shared, name, work)


def test_autocast_computes_in_bfloat16_beside_shared_memory(shared: Service, name: str) -> None:
    def work(model: nn.Module, optimizer: AdamW) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    same_bits(shared, name, work)


def test_two_optimizers_of_one_process_have_memory_of_their_own(shared: Service, name: str) -> None:
    def work(transport: str) -> list[str]:
        one, two = net(), net()
        matrices = [("matrix", one[0].weight)]
        with (
            Muon(matrices, lr=0.02, url=shared.url, run=f"{name}-1-{transport}", transport=transport) as first,  # type: ignore[arg-type]
            adamw(two, shared, f"{name}-2-{transport}", transport) as second,
        ):
            for step in range(STEPS):
                for model, optimizer in ((one, first), (two, second)):
                    optimizer.zero_grad()
                    loss_of(model, step).backward()  # type: ignore[no-untyped-call]
                # Both steps are under way with what both backward passes have left.
                first.step()
                second.step()
            return [first.run.digest, second.run.digest]

    assert work("shm") == work("websocket")


class Rows(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Each row says which process has made it."""

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        inputs, targets = data(index)
        return inputs[0], targets[0], os.getpid()


def mapped() -> int:
    """Arenas that are mapped into this process."""
    return sum("/memfd:muond" in line for line in Path("/proc/self/maps").read_text().splitlines())


# Python 3.12 and later warn of every fork in a process with threads, as ours has.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_loader_are_forked_and_end_while_arenas_are_mapped(shared: Service, name: str) -> None:
    def work(model: nn.Module, optimizer: AdamW) -> None:
        loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # opens the run
        before = mapped()
        makers: set[int] = set()
        for _ in range(2):
            loader = DataLoader(Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork")
            for inputs, targets, processes in itertools.islice(loader, STEPS):
                makers.update(processes.tolist())
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
            del loader
        assert len(makers - {os.getpid()}) == 4, "two workers for each loader"
        assert mapped() == before, "who ends has taken nothing along"

    same_bits(shared, name, work)
