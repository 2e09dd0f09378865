"""Gradients that leave during the backward pass: the same bits as without, and a clear word where that cannot be."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import distance, loss_of, net, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from muond import MuondError
from muond.torch import AdamW, Muon
from service import Proxy, Service


def adamw(model: nn.Module, service: Service, name: str, **options: Any) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2, url=service.url, run=name, **{"overlap": True, **options})


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def trained(service: Service, name: str, steps: int = 6, **options: Any) -> tuple[nn.Module, str]:
    model = net()
    with adamw(model, service, name, overlap=False, **options) as optimizer:
        train(model, optimizer, steps)
        return model, optimizer.run.digest


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_transport_has_the_same_bits(shared: Service, name: str, overlap: bool, dtype: Any) -> None:
    runs = []
    for transport in ("shm", "websocket"):
        model = net()
        options = {"overlap": overlap, "transport": transport, "gradient_dtype": dtype}
        with adamw(model, shared, f"{name}-{transport}", **options) as optimizer:
            train(model, optimizer, 4)
            assert optimizer.run.transport == transport
            runs.append((model, optimizer.run.digest))
    (ours, digest), (theirs, same_digest) = runs
    assert digest == same_digest
    assert same(ours, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_and_without_overlap_are_the_same_bits(shared: Service, name: str, dtype: Any) -> None:
    model, digest = trained(shared, f"{name}-a", gradient_dtype=dtype)
    ours = net()
    with adamw(ours, shared, f"{name}-b", gradient_dtype=dtype) as optimizer:
        train(ours, optimizer, 6)
        assert optimizer.run.digest == digest
    assert same(ours, model)


def test_gradients_have_left_before_the_step_is_taken(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:
        loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
        assert optimizer.run.in_flight
        assert all(optimizer.run.has_gradient(index) for index in range(4))
        before = [p.detach().clone() for p in model.parameters()]
        # Their updates may be here, and are not applied before step(): the backward pass may still need the weights.
        optimizer.run._events.put(optimizer.run._events.get(timeout=30))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert optimizer.step().applied == 4


def test_accumulation_sends_the_gradients_of_the_last_pass(shared: Service, name: str) -> None:
    def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(1, 5):
            optimizer.zero_grad()
            # The last step of an epoch has fewer passes.
            for part in range(3 if step < 4 else 2):
                (loss_of(model, 10 * step + part) / 3).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    ours, theirs = net(), net()
    with adamw(ours, shared, f"{name}-a", accumulation_steps=3) as optimizer:
        accumulate(ours, optimizer)
        digest = optimizer.run.digest
    with adamw(theirs, shared, f"{name}-b", overlap=False) as optimizer:
        accumulate(theirs, optimizer)
        assert optimizer.run.digest == digest
    assert same(ours, theirs)


def test_an_accumulation_that_was_given_up_is_not_counted(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name, accumulation_steps=2) as optimizer:
        loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss_of(model, 2).backward()  # type: ignore[no-untyped-call]
        assert optimizer.step_count == 0
        loss_of(model, 3).backward()  # type: ignore[no-untyped-call]
        assert optimizer.run.has_gradient(3)
        assert optimizer.step().step == 1


def test_another_gradient_after_the_one_that_was_sent_is_an_error(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name):
        loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="backward passes before a step are 2, accumulation_steps is 1"):
            loss_of(model, 2).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.01),
        lambda model: model[0].weight.grad.mul_(2),
        lambda model: setattr(model[0].weight, "grad", torch.zeros(24, 12)),
        lambda model: setattr(model[0].weight, "grad", None),
    ],
    ids=["clip", "in-place", "replaced", "dropped"],
)
def test_a_gradient_that_was_changed_after_it_was_sent_is_an_error(
    shared: Service, name: str, change: Callable[[Any], object]
) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:
        loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
        change(model)
        with pytest.raises(RuntimeError, match=r"was changed after overlap=True had sent it .*need overlap=False"):
            optimizer.step()
        assert optimizer.run.step_count == 0


def test_a_rate_that_was_changed_after_the_step_had_begun_is_an_error(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:
        loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(RuntimeError, match="change them before backward"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-2
        assert optimizer.step().step == 1


def test_after_a_backward_pass_that_failed_zero_grad_ends_the_half_step(shared: Service, name: str) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            raise FloatingPointError("out of memory, say")

    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    with adamw(model, shared, name) as optimizer:
        hidden = model[1](model[0](torch.ones(3, 12)))
        with pytest.raises(FloatingPointError):
            model[2](Fails.apply(hidden)).sum().backward()
        assert optimizer.run.in_flight
        with pytest.raises(RuntimeError, match=r"step 1 of run .* is under way"):
            optimizer.state_dict()
        with pytest.warns(UserWarning, match="step 1 was left with 2 of 4 gradients sent, and was ended with those"):
            optimizer.zero_grad()
        assert optimizer.receipt is not None
        assert (optimizer.receipt.applied, optimizer.receipt.skipped) == (2, 2)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert moved == [False, False, True, True]
        train(model, optimizer, 2)
        assert optimizer.step_count == 3


def test_frozen_and_unfrozen_parameters(shared: Service, name: str) -> None:
    def frozen_for_a_while(model: Any, optimizer: torch.optim.Optimizer) -> None:
        model[0].weight.requires_grad_(False)
        train(model, optimizer, 2)
        model[0].weight.requires_grad_(True)
        train(model, optimizer, 3, 3)

    ours, theirs = net(), net()
    ours[0].weight.requires_grad_(False)
    with adamw(ours, shared, f"{name}-a") as optimizer:
        frozen_for_a_while(ours, optimizer)
    with adamw(theirs, shared, f"{name}-b", overlap=False) as optimizer:
        frozen_for_a_while(theirs, optimizer)
    # Without hooks to set up, the frozen one was no parameter of the run at first.
    assert distance(ours, theirs) == 0


def test_a_cut_during_the_backward_pass_changes_nothing(
    shared: Service, proxy: Callable[..., Proxy], name: str
) -> None:
    _, digest = trained(shared, f"{name}-a")
    ours = net()
    cutting = proxy(shared.port)
    with AdamW(ours.parameters(), lr=1e-2, url=cutting.url, run=f"{name}-b", overlap=True) as optimizer:
        for step in range(1, 7):
            optimizer.zero_grad()
            loss_of(ours, step).backward()  # type: ignore[no-untyped-call]
            cutting.cut()
            optimizer.step()
        assert optimizer.run.digest == digest


def test_a_step_that_was_given_up_is_taken_again_with_the_same_gradients(
    shared: Service, proxy: Callable[..., Proxy], name: str
) -> None:
    _, digest = trained(shared, f"{name}-a", 2)
    ours = net()
    # The first connection only looks whether somebody is there.
    cutting = proxy(shared.port, [1 << 30, 3_000, 0, 0])
    with AdamW(
        ours.parameters(), lr=1e-2, url=cutting.url, run=f"{name}-b", overlap=True, retries=0, transport="websocket"
    ) as optimizer:
        loss_of(ours, 1).backward()  # type: ignore[no-untyped-call]
        failures = 0
        while optimizer.step_count == 0:
            try:
                optimizer.step()
            except MuondError as error:
                assert error.retryable  # noqa: PT017 - the loop goes on
                failures += 1
        assert failures == 3
        train(ours, optimizer, 1, 2)
        assert optimizer.run.digest == digest


def test_tied_weights_under_checkpointing(shared: Service, name: str) -> None:
    class Tied(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(12, 12)
            self.head = nn.Linear(12, 6)
            self.reentrant = reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=self.reentrant)
            return self.head(x)

    ours, theirs = Tied(False), Tied(False)
    with adamw(ours, shared, f"{name}-a") as optimizer:
        train(ours, optimizer, 3)
        digest = optimizer.run.digest
    with adamw(theirs, shared, f"{name}-b", overlap=False) as optimizer:
        train(theirs, optimizer, 3)
        assert optimizer.run.digest == digest
    # Reentrant checkpointing brings the gradient of a weight that is used twice in two parts.
    reentrant = Tied(True)
    with (
        adamw(reentrant, shared, f"{name}-c") as optimizer,
        pytest.raises(RuntimeError, match="with reentrant activation checkpointing use overlap=False"),
    ):
        train(reentrant, optimizer, 1)


def test_an_optimizer_that_was_dropped_sends_nothing_any_more(shared: Service, name: str) -> None:
    model = net()
    optimizer = adamw(model, shared, name)
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    loss_of(model, 2).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    with adamw(model, shared, name, mode="resume") as again:
        train(model, again, 1)
        assert again.step_count == 2


def test_a_closed_optimizer_takes_its_hooks_along(shared: Service, name: str) -> None:
    model = net()
    optimizer = adamw(model, shared, name)
    train(model, optimizer, 1)
    optimizer.close()
    loss_of(model, 2).backward()  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
    assert model[0].weight.grad is None


def test_an_error_at_open_comes_out_of_the_backward_pass(shared: Service, name: str) -> None:
    with adamw(net(), shared, name, overlap=False) as first:
        first.open()
    model = net()
    with adamw(model, shared, name), pytest.raises(MuondError, match="RUN_EXISTS"):
        loss_of(model, 1).backward()  # type: ignore[no-untyped-call]
    sparse = nn.Embedding(4, 2, sparse=True)
    with (
        Muon(sparse.named_parameters(), url=shared.url, run=f"{name}-sparse", overlap=True),
        pytest.raises(RuntimeError, match="is sparse"),
    ):
        sparse(torch.tensor([1])).sum().backward()


def test_nothing_is_warned_about_in_an_ordinary_training(shared: Service, name: str) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adamw(model, shared, name) as optimizer:
            train(model, optimizer, 3)
