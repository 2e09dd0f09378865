"""muond.DiLoCo: the weights are those of torch's own optimizers in the paper's algorithm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from models import distance, loss_of, net, saved_and_loaded, train
from patient import PATIENT
from torch import nn

import muond
from muond import DiLoCo, MuondError
from service import Service


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def reference(model: nn.Module, steps: int, sync_every: int, *, lr: float = 0.7, momentum: float = 0.9) -> nn.Module:
    """Algorithm 1 of arXiv 2311.08105 with one worker, in float64 outside: θ <- OuterOpt(θ, θ - θ_k)."""
    inner = adamw(model)
    outer_weights = [p.detach().double().clone().requires_grad_() for p in model.parameters()]
    outer = torch.optim.SGD(outer_weights, lr=lr, momentum=momentum, nesterov=True)
    for step in range(1, steps + 1):
        inner.zero_grad()
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        inner.step()
        if step % sync_every == 0:
            for wide, p in zip(outer_weights, model.parameters(), strict=True):
                wide.grad = wide.detach() - p.detach().double()
            outer.step()
            with torch.no_grad():
                for wide, p in zip(outer_weights, model.parameters(), strict=True):
                    p.copy_(wide)
    return model


@pytest.mark.parametrize("sync_every", [1, 3])
def test_the_weights_are_those_of_the_paper(shared: Service, name: str, sync_every: int) -> None:
    model = net()
    with DiLoCo(model, adamw(model), sync_every, url=shared.url, run=name) as optimizer:
        train(model, optimizer, 8)
        assert optimizer.outer.step_count == 8 // sync_every
        assert optimizer.inner_steps == 8 % sync_every
    assert distance(model, reference(net(), 8, sync_every)) < 2e-6


def test_a_preset_and_values_beside_it(shared: Service, name: str) -> None:
    model = net()
    with DiLoCo(
        model.named_parameters(), adamw(model), 2, url=shared.url, run=name, preset="muloco", lr=0.5
    ) as optimizer:
        train(model, optimizer, 4)
        held = optimizer.receipt.groups["outer"]  # type: ignore[union-attr]
        assert (held["preset"], held["lr"], held["momentum"], held["nesterov"]) == ("muloco", 0.5, 0.9, True)
    assert distance(model, reference(net(), 4, 2, lr=0.5)) < 2e-6


def test_schedulers_closures_and_hooks_see_the_inner_optimizer(shared: Service) -> None:
    model = net()
    inner = adamw(model)
    with DiLoCo(model, inner, 2, url=shared.url) as optimizer:
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.defaults is inner.defaults
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, inner)]
        called: list[int] = []
        optimizer.register_step_post_hook(lambda *_: called.append(optimizer.inner_steps))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 1)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        first, second = optimizer.step(closure), optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step()
        assert second < first
        assert called == [1, 0]
        assert inner.param_groups[0]["lr"] == 1e-2 * 0.25
        assert optimizer.state is inner.state
        optimizer.state = inner.state
        optimizer.param_groups = inner.param_groups
        optimizer.defaults = inner.defaults


def test_the_inner_optimizer_may_be_one_of_the_service(shared: Service) -> None:
    """MuLoCo with both optimizers in the service."""
    model, local = net(), net()
    groups = [
        {"parameters": ["0.weight", "2.weight"], "algorithm": "muon", "lr": 0.02},
        {"parameters": "*.bias", "algorithm": "adamw", "lr": 0.01},
    ]
    inner = muond.Optimizer(model.named_parameters(), groups, url=shared.url)
    with inner, DiLoCo(model, inner, 2, url=shared.url, preset="muloco") as optimizer:
        train(model, optimizer, 2)
    with muond.Optimizer(local.named_parameters(), groups, url=shared.url) as alone:
        train(local, alone, 2)
    for start, p, q in zip(net().parameters(), model.parameters(), local.parameters(), strict=True):
        # The first outer step with Nesterov momentum goes lr · (1 + momentum) times as far.
        torch.testing.assert_close(p - start, (q - start) * 0.9 * 1.9, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("gradient_dtype", ["float32", "int4_block64"])
def test_a_state_dict_goes_on_with_the_same_bits(shared: Service, at: int, gradient_dtype: Any) -> None:
    model = net()
    with DiLoCo(model, adamw(model), 2, url=shared.url, gradient_dtype=gradient_dtype) as optimizer:
        train(model, optimizer, at)
        state, weights = saved_and_loaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        train(model, optimizer, 5, at + 1)
    again = net()
    again.load_state_dict(weights)
    with DiLoCo(again, adamw(again), 2, url=shared.url, gradient_dtype=gradient_dtype) as other:
        other.load_state_dict(state)
        assert other.inner_steps == at % 2
        train(again, other, 5, at + 1)
    assert distance(again, model) == 0


def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(shared: Service) -> None:
    model = net()
    inner = adamw(model)
    with DiLoCo(model, inner, 3, url=shared.url) as optimizer:
        train(model, optimizer, 2)
        state = optimizer.state_dict()
        with pytest.raises(ValueError, match="has no 'diloco'"):
            optimizer.load_state_dict(inner.state_dict())
        with pytest.raises(ValueError, match=r"is of 3 inner steps after a synchronization, sync_every is 3"):
            optimizer.load_state_dict({**state, "diloco": {**state["diloco"], "inner_steps": 3}})
        with pytest.raises(ValueError, match=r"'w' has shape \[1\] in the state dict and None here"):
            optimizer.load_state_dict(
                {
                    **state,
                    "diloco": {**state["diloco"], "reference": {**state["diloco"]["reference"], "w": torch.zeros(1)}},
                }
            )
        assert optimizer.inner_steps == 2


def test_a_half_precision_model_has_a_wide_reference(shared: Service) -> None:
    model = net(torch.bfloat16)
    with DiLoCo(model, torch.optim.SGD(model.parameters(), lr=0.0), 1, url=shared.url) as optimizer:
        train(model, optimizer, 2)
        saved = optimizer.state_dict()["diloco"]["reference"]
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # Nothing has moved, so nothing is fed: a reference that lies between two bfloat16 pulls nowhere.
    assert distance(model, net(torch.bfloat16)) == 0


def test_a_synchronization_that_fails_is_taken_again_and_no_inner_step_with_it(
    durable: Callable[..., Service], name: str
) -> None:
    service = durable("--durability", "journal")
    model = net()
    with DiLoCo(model, adamw(model), 2, url=service.url, run=name, retries=0) as optimizer:
        train(model, optimizer, 3)
        service.kill()
        optimizer.zero_grad()
        loss_of(model, 4).backward()  # type: ignore[no-untyped-call]
        with pytest.raises(MuondError):
            optimizer.step()
        with pytest.raises(RuntimeError, match="a synchronization has failed"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match="has failed on its way to the service"):
            optimizer.discard()
        # The gradients that are there now are not stepped with.
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
        service.restart()
        optimizer.step()
        train(model, optimizer, 2, 5)
    assert distance(model, reference(net(), 6, 2)) < 2e-6


def test_weights_with_nan_are_not_synchronized(shared: Service) -> None:
    model = net()
    with DiLoCo(model, adamw(model), 1, url=shared.url) as optimizer:
        train(model, optimizer, 1)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        before = optimizer.state_dict()["diloco"]["reference"]
        with pytest.raises(MuondError, match="nothing has moved") as caught:
            optimizer.step()
        assert caught.value.code == "GRADIENT_NOT_FINITE"
        assert optimizer.outer.step_count == 1
        optimizer.discard()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert optimizer.inner_steps == 0


def test_a_round_that_the_service_takes_in_part_is_over(shared: Service) -> None:
    """A momentum beyond float32 is refused, and the other parameters have moved."""
    model = net()
    with DiLoCo(model, adamw(model), 1, url=shared.url) as optimizer:
        before = optimizer.state_dict()["diloco"]["reference"]
        with torch.no_grad():
            model[0].bias.fill_(3e38)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(MuondError, match=r"step 1 was ended without 0\.bias"):
            optimizer.step()
        assert (optimizer.outer.step_count, optimizer.inner_steps) == (1, 0)
        moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
        assert moved == {"0.weight": True, "0.bias": False, "2.weight": True, "2.bias": True}


def test_what_cannot_be_is_refused(shared: Service) -> None:
    model, other = net(), net()
    inner = adamw(model)
    with pytest.raises(ValueError, match="sync_every is 0, at least 1"):
        DiLoCo(model, inner, 0, url=shared.url)
    with pytest.raises(ValueError, match=r"a parameter of shape \[24, 12\] that the model does not have"):
        DiLoCo(other, inner, url=shared.url)
    with pytest.raises(TypeError, match=r"needs a module or its named_parameters\(\), this one is a Parameter"):
        DiLoCo(model.parameters(), inner, url=shared.url)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="overlap is not possible: the outer optimizer has copies"):
        DiLoCo(model, inner, url=shared.url, overlap=True)
    with DiLoCo(model, inner, url=shared.url) as optimizer:
        with pytest.raises(ValueError, match="a param_group cannot be added to DiLoCo"):
            optimizer.add_param_group({"params": list(other.parameters())})
        with pytest.raises(TypeError, match="DiLoCo cannot be copied or pickled"):
            copy.deepcopy(optimizer)


def test_a_service_that_is_killed_in_the_middle_of_a_round_changes_nothing(durable: Callable[..., Service]) -> None:
    service = durable("--durability", "journal")
    model = net()
    with DiLoCo(model, adamw(model), 3, url=service.url, **PATIENT) as optimizer:
        train(model, optimizer, 4)
        service.kill_and_restart()
        train(model, optimizer, 4, 5)
    assert distance(model, reference(net(), 8, 3)) < 2e-6


def replicas_of(count: int, url: str, run: str, **options: Any) -> list[tuple[nn.Module, DiLoCo]]:
    models = [net() for _ in range(count)]
    return [
        (model, DiLoCo(model, adamw(model), 2, replica=replica, replicas=count, url=url, run=run, **options))
        for replica, model in enumerate(models)
    ]


def together(work: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(each) for each in work]]


def train_on(replica: int, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 1) -> None:
    """Each replica has data of its own."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, 100 * replica + step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def mean_reference(count: int, rounds: int, sync_every: int) -> nn.Module:
    """Algorithm 1 of arXiv 2311.08105 with several workers, in float64 outside."""
    shared = net()
    weights = [p.detach().double().clone().requires_grad_() for p in shared.parameters()]
    outer = torch.optim.SGD(weights, lr=0.7, momentum=0.9, nesterov=True)
    workers = [net() for _ in range(count)]
    inners = [adamw(worker) for worker in workers]
    for number in range(rounds):
        for replica, (worker, inner) in enumerate(zip(workers, inners, strict=True)):
            train_on(replica, worker, inner, sync_every, number * sync_every + 1)
        for i, wide in enumerate(weights):
            moved = [wide.detach() - list(worker.parameters())[i].detach().double() for worker in workers]
            wide.grad = torch.stack(moved).mean(dim=0)
        outer.step()
        with torch.no_grad():
            for worker in workers:
                for wide, p in zip(weights, worker.parameters(), strict=True):
                    p.copy_(wide)
    return workers[0]


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_have_the_weights_of_the_paper(shared: Service, name: str, count: int) -> None:
    replicas = replicas_of(count, shared.url, name)
    together([partial(train_on, r, model, optimizer, 6) for r, (model, optimizer) in enumerate(replicas)])
    for model, optimizer in replicas:
        assert distance(model, replicas[0][0]) == 0
        assert [one["replica"] for one in optimizer.receipt.contributors] == list(range(count))  # type: ignore[union-attr]
        optimizer.close()
    assert distance(replicas[0][0], mean_reference(count, 3, 2)) < 2e-6


def test_a_replica_that_is_gone_is_not_waited_for_and_comes_back(shared: Service, name: str) -> None:
    quorum: dict[str, Any] = {"min_replicas": 1, "deadline_seconds": 60.0, "gradient_dtype": "int4_block64"}
    (first, one), (second, other) = replicas_of(2, shared.url, name, **quorum)
    # The first step waits for whoever is there.
    for optimizer in (one, other):
        optimizer.outer.open()
    together([partial(train_on, 0, first, one, 4), partial(train_on, 1, second, other, 4)])
    old = other.state_dict()
    other.close()
    train_on(0, first, one, 2, 5)
    assert [each["replica"] for each in one.receipt.contributors] == [0]  # type: ignore[union-attr]
    again = net()
    with DiLoCo(
        again, adamw(again), 2, replica=1, replicas=2, url=shared.url, run=name, takeover=True, **quorum
    ) as back:
        with pytest.raises(MuondError, match="is of step 2 with digest") as caught:
            back.rejoin(old)
        assert caught.value.code == "STEP_CONFLICT"
        with pytest.raises(MuondError, match="is of step 2 with digest"):
            back.load_state_dict(old)
        back.rejoin(saved_and_loaded(one.state_dict()))
        assert distance(again, first) == 0
        together([partial(train_on, 0, first, one, 2, 7), partial(train_on, 1, again, back, 2, 7)])
        assert distance(again, first) == 0
        assert len(back.receipt.contributors) == 2  # type: ignore[union-attr]
        # Its own state, of the step that the run is at, goes on with what its gradients have lost.
        state, lost = saved_and_loaded(back.state_dict()), back.outer.state[back._pairs[0][2]]["error_feedback"]
        back.load_state_dict(state)
        assert torch.equal(back.outer.state[back._pairs[0][2]]["error_feedback"], lost)
        with pytest.raises(ValueError, match="the state dict is of several, here is one replica"):
            DiLoCo(again, adamw(again), 2, url=shared.url).load_state_dict(state)
    one.close()


def test_a_replica_that_is_late_has_what_the_others_have(shared: Service, name: str) -> None:
    quorum: dict[str, Any] = {"min_replicas": 2, "deadline_seconds": 0.05}
    replicas = replicas_of(3, shared.url, name, **quorum)
    for _, optimizer in replicas:
        optimizer.outer.open()
    late, slow = replicas[2]
    together([partial(train_on, r, model, optimizer, 2) for r, (model, optimizer) in enumerate(replicas[:2])])
    train_on(2, late, slow, 2)
    assert slow.receipt is not None
    assert not slow.receipt.contributed
    assert distance(late, replicas[0][0]) == 0
    for _, optimizer in replicas:
        optimizer.close()


def test_a_replica_that_begins_after_the_others_have_gone_on_is_refused(shared: Service, name: str) -> None:
    (first, one), (second, other) = replicas_of(2, shared.url, name, min_replicas=1)
    train_on(0, first, one, 4)
    before = [p.detach().clone() for p in second.parameters()]
    with pytest.raises(
        MuondError, match="is at step 2, the weights of replica 1 are those of step 0: load_state_dict"
    ) as caught:
        train_on(1, second, other, 1)
    assert (caught.value.code, caught.value.fields.expected_step) == ("STEP_CONFLICT", 3)
    assert all(torch.equal(p, old) for p, old in zip(second.parameters(), before, strict=True))
    other.rejoin(saved_and_loaded(one.state_dict()))
    together([partial(train_on, 0, first, one, 2, 5), partial(train_on, 1, second, other, 2, 5)])
    assert distance(first, second) == 0
    one.close()
    other.close()


def test_replicas_that_cannot_be_are_refused(shared: Service) -> None:
    model = net()
    for options, message in [
        ({"replica": 2, "replicas": 2, "run": "r"}, "replica is 2, expected 0 to 1"),
        ({"replicas": 2}, "replicas need run='a name'"),
        ({"min_replicas": 1}, "min_replicas is 1, and there is one replica"),
    ]:
        with pytest.raises(ValueError, match=message):
            DiLoCo(model, adamw(model), url=shared.url, **options)  # type: ignore[arg-type]


def test_a_replica_that_begins_with_other_weights_is_refused(shared: Service, name: str) -> None:
    (_, first), (model, second) = replicas_of(2, shared.url, name)
    other = net()
    nn.init.zeros_(other[0].bias)
    third = DiLoCo(other, adamw(other), 2, replica=1, replicas=2, url=shared.url, run=name)
    first.outer.open()
    with pytest.raises(
        MuondError, match=r"replica 1 begins with other weights than replica 0.*broadcast.*file \["
    ) as caught:
        third.outer.open()
    assert caught.value.code == "RUN_MISMATCH"
    # torch.distributed.broadcast, or a file.
    model.load_state_dict(copy.deepcopy(net().state_dict()))
    second.outer.open()
    for optimizer in (first, second, third):
        optimizer.close()
