"""The tables of this client are those of the service."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from muond.rest import Rest
from muond.torch.hyperparameters import DEFAULTS, FIXED, changes, hyperparameters, on_the_wire
from muond.torch.settings import Options, Settings
from muond.transport.address import endpoint
from service import Service


def test_names_defaults_and_what_is_fixed_are_those_that_the_service_prints(shared: Service) -> None:
    with Rest(endpoint(shared.url)) as rest:
        algorithms: dict[str, Any] = rest.capabilities()["algorithms"]
    assert set(algorithms) == set(DEFAULTS)
    for algorithm, described in algorithms.items():
        ours = {name: on_the_wire(name, value) for name, value in DEFAULTS[algorithm].items()}
        assert ours == {name: entry["default"] for name, entry in described.items()}
        assert {name for name, entry in described.items() if not entry["sticky"]} == FIXED & set(ours)


def test_defaults_are_torchs_where_torch_has_the_algorithm() -> None:
    parameter = [torch.zeros(2, 2, requires_grad=True)]
    theirs: dict[str, torch.optim.Optimizer] = {
        "muon": torch.optim.Muon(parameter),
        "adamw": torch.optim.AdamW(parameter),
        "adam": torch.optim.Adam(parameter),
        "rmsprop": torch.optim.RMSprop(parameter),
        "sgd": torch.optim.SGD(parameter),
    }
    for algorithm, optimizer in theirs.items():
        for name in DEFAULTS[algorithm].keys() & optimizer.defaults.keys():
            assert DEFAULTS[algorithm][name] == optimizer.defaults[name], (algorithm, name)


def test_values_of_schedulers_and_torch_become_plain() -> None:
    group = {**DEFAULTS["adamw"], "algorithm": "adamw", "lr": torch.tensor(0.5), "betas": (torch.tensor(0.5), 0.75)}
    assert hyperparameters({**group, "initial_lr": 1.0, "max_lr": 3}) == {
        "lr": 0.5,
        "betas": [0.5, 0.75],
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "amsgrad": False,
    }
    known = hyperparameters(group)
    assert changes(group, known) == {}
    assert changes({**group, "lr": 1}, known) == {"lr": 1}
    with pytest.raises(ValueError, match=r"a tensor of shape \[2\], expected one element"):
        hyperparameters({**group, "lr": torch.zeros(2)})


def test_every_option_is_a_setting() -> None:
    assert set(Options.__annotations__) == set(Settings.__dataclass_fields__)
