"""Hyperparameters that a program changes between two steps: the values of now hold, over the state that there is."""

from __future__ import annotations

from typing import Any

import pytest
from beside import apart, made, model, steps

from service import Service

# What each group is made with beside beside.HYPERPARAMETERS, and what is written into it, two steps each.
CHANGES: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("adamw", "weight_decay", [0.0, 0.3, 0.0], {}),
    ("adamw", "betas", [(0.9, 0.99), (0.5, 0.9), (0.0, 0.5)], {}),
    ("adamw", "eps", [1e-8, 1e-2, 1.0], {}),
    ("adamw", "maximize", [False, True, False], {}),
    ("adam", "weight_decay", [0.0, 0.3, 0.0], {}),
    ("adam", "maximize", [True, False], {}),
    ("sgd", "momentum", [0.9, 0.0, 0.5], {}),
    ("sgd", "momentum", [0.0, 0.9, 0.5], {}),
    ("sgd", "dampening", [0.0, 0.5, 0.9], {}),
    ("sgd", "nesterov", [False, True, False], {"dampening": 0.0}),
    ("sgd", "maximize", [True, False], {}),
    ("rmsprop", "momentum", [0.5, 0.9, 0.0], {}),
    ("rmsprop", "alpha", [0.99, 0.5, 0.0], {}),
    ("rmsprop", "eps", [1e-8, 1e-1], {}),
    ("rmsprop", "weight_decay", [0.0, 0.1], {}),
    ("muon", "momentum", [0.95, 0.5, 0.0], {}),
    ("muon", "nesterov", [True, False, True], {}),
    ("muon", "ns_steps", [5, 3, 7], {}),
    ("muon", "weight_decay", [0.0, 0.5], {}),
    ("muon", "adjust_lr_fn", [None, "match_rms_adamw", "original"], {}),
    ("muon", "ns_coefficients", [(3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)], {}),
]


@pytest.mark.parametrize(("algorithm", "key", "values", "made_with"), CHANGES)
def test_a_changed_value_is_torchs(
    shared: Service, algorithm: str, key: str, values: list[Any], made_with: dict[str, Any]
) -> None:
    pair = made(shared, algorithm, **made_with)
    ends = []
    for make in pair.both:
        module = model()
        optimizer = make(module.parameters())
        for turn, value in enumerate(values):
            optimizer.param_groups[0][key] = value
            steps(module, optimizer, 2, 1 + 2 * turn)
        ends.append(module)
    assert apart(ends[1], ends[0]) < pair.tolerance


def test_momentum_begins_late_together_with_another_group(shared: Service) -> None:
    pair = made(shared, "sgd", momentum=0.0, dampening=0.25)
    ends = []
    for make in pair.both:
        module = model()
        optimizer = make([module[0].weight])
        steps(module, optimizer, 2)
        optimizer.param_groups[0]["momentum"] = 0.9
        values = {"algorithm": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.25}
        optimizer.add_param_group({"params": [module[2].weight], **values})
        steps(module, optimizer, 2, 3)
        ends.append(module)
    assert apart(ends[1], ends[0]) < pair.tolerance


def test_a_buffer_of_none_begins_anew(shared: Service) -> None:
    pair = made(shared, "sgd")
    ends = []
    for make in pair.both:
        module = model()
        optimizer = make(module.parameters())
        steps(module, optimizer, 2)
        optimizer.state[module[0].weight]["momentum_buffer"] = None
        steps(module, optimizer, 2, 3)
        ends.append(module)
    assert apart(ends[1], ends[0]) < pair.tolerance
