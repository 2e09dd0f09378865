"""A state_dict whose tensors the service takes: it goes back with them, or begins with what torch's own optimizer had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import distance, matrices, net, saved_and_loaded, train

from muond.torch import AdamW, Muon, Optimizer
from service import Service

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}
SGD: dict[str, Any] = {"algorithm": "sgd", "lr": 0.05, "momentum": 0.9}
ALGORITHMS: list[dict[str, Any]] = [
    {"algorithm": "adamw", "lr": 1e-2},
    {"algorithm": "adam", "lr": 1e-2, "amsgrad": True},
    {"algorithm": "rmsprop", "lr": 1e-3, "momentum": 0.9},
    SGD,
]


def everything(model: torch.nn.Module, service: Service, name: str, algorithm: dict[str, Any]) -> Optimizer:
    """Muon for the matrices, one of the others for the rest."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [item for item in named.items() if item[1].ndim == 2], "algorithm": "muon", "lr": 0.02},
        {"params": [item for item in named.items() if item[1].ndim == 1], **algorithm},
    ]
    return Optimizer(groups, url=service.url, run=name, **EXACT)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda group: str(group["algorithm"]))
def test_a_run_that_has_gone_on_goes_back_to_the_tensors_of_a_state_dict(
    shared: Service, name: str, algorithm: dict[str, Any]
) -> None:
    alone, model = net(), net()
    with everything(alone, shared, f"{name}-alone", algorithm) as optimizer:
        train(alone, optimizer, 8)
    with everything(model, shared, name, algorithm) as optimizer:
        train(model, optimizer, 3)
        kept = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, 2, 40)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        assert optimizer.step_count == 5, "the service counts on, its state is that of step 3"
        again = optimizer.state_dict()["state"]
        for index, entries in kept["optimizer"]["state"].items():
            for key, value in entries.items():
                assert torch.equal(again[index][key], value), (index, key)
        train(model, optimizer, 5, 4)
    assert distance(model, alone) == 0


def test_a_service_that_has_never_heard_of_the_run_takes_its_state(shared: Service, name: str) -> None:
    alone, model = net(), net()
    with everything(alone, shared, f"{name}-alone", SGD) as optimizer:
        train(alone, optimizer, 8)
    with everything(model, shared, f"{name}-a", SGD) as optimizer:
        train(model, optimizer, 3)
        kept = saved_and_loaded(optimizer.state_dict())
    with everything(model, shared, f"{name}-b", SGD) as optimizer:
        optimizer.load_state_dict(kept)
        assert optimizer.step_count == 0
        train(model, optimizer, 5, 4)
        assert optimizer.step_count == 5
    assert distance(model, alone) == 0


def test_a_parameter_that_the_state_dict_has_nothing_of_has_no_state(shared: Service, name: str) -> None:
    model = net()
    bias = model[0].bias
    assert isinstance(bias, torch.nn.Parameter)
    with AdamW(model.named_parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        bias.requires_grad_(False)
        train(model, optimizer, 2)
        kept = saved_and_loaded(optimizer.state_dict())
        bias.requires_grad_(True)
        train(model, optimizer, 1, 3)
        assert sorted(optimizer.state_dict()["state"]) == [0, 1, 2, 3]
        optimizer.load_state_dict(kept)
        assert sorted(optimizer.state_dict()["state"]) == [0, 2, 3]


def test_adamw_goes_on_from_torchs_own_state(shared: Service, name: str) -> None:
    theirs, ours = net(), net()
    reference = torch.optim.AdamW(theirs.named_parameters(), lr=1e-2)
    train(theirs, reference, 5)
    ours.load_state_dict(theirs.state_dict())
    with AdamW(ours.named_parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        optimizer.load_state_dict(saved_and_loaded(reference.state_dict()))
        train(theirs, reference, 3, 6)
        train(ours, optimizer, 3, 6)
    assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("form", ["ema", "heavy_ball"])
def test_muon_goes_on_from_torchs_own_state_in_either_form(shared: Service, name: str, form: str) -> None:
    theirs, ours = net(), net()
    reference = torch.optim.Muon(matrices(theirs), lr=0.02, momentum=0.9)
    train(theirs, reference, 5)
    ours.load_state_dict(theirs.state_dict())
    with Muon(
        matrices(ours), lr=0.02, momentum=0.9, momentum_form=form, url=shared.url, run=name, **EXACT
    ) as optimizer:
        optimizer.load_state_dict(saved_and_loaded(reference.state_dict()))
        state = optimizer.state_dict()["state"]
    scale = 1.0 if form == "ema" else 10.0
    for index, entries in reference.state_dict()["state"].items():
        torch.testing.assert_close(state[index]["momentum_buffer"], scale * entries["momentum_buffer"])


def test_sgd_without_momentum_has_no_buffer_in_torch_and_zeros_here(shared: Service, name: str) -> None:
    theirs, ours = net(), net()
    reference = torch.optim.SGD(theirs.named_parameters(), lr=0.05)
    train(theirs, reference, 2)
    ours.load_state_dict(theirs.state_dict())
    group = {"params": list(ours.named_parameters()), "algorithm": "sgd", "lr": 0.05, "momentum": 0.0}
    with Optimizer([group], url=shared.url, run=name, **EXACT) as optimizer:
        optimizer.load_state_dict(saved_and_loaded(reference.state_dict()))
        train(theirs, reference, 3, 3)
        train(ours, optimizer, 3, 3)
    assert distance(ours, theirs) < 1e-6
