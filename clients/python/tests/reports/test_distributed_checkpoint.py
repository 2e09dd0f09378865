"""torch.distributed.checkpoint's get_ and set_optimizer_state_dict: a save takes no step, a load loses nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from beside import ALGORITHMS, apart, made, model, relative, state_apart, steps
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from service import Service

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:torch.distributed is disabled")
FLAT = [StateDictOptions(flatten_optimizer_state_dict=flat) for flat in (False, True)]


@pytest.mark.parametrize("options", FLAT, ids=["nested", "flat"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_save_between_steps_takes_no_step(shared: Service, algorithm: str, options: StateDictOptions) -> None:
    pair = made(shared, algorithm)
    theirs, ours, alone = model(), model(), model()
    reference, optimizer, other = (
        pair.theirs(theirs.parameters()),
        pair.ours(ours.parameters()),
        pair.ours(alone.parameters()),
    )
    for step in range(1, 7):
        for module, each in ((theirs, reference), (ours, optimizer)):
            steps(module, each, 1, step)
            each.zero_grad()
            get_optimizer_state_dict(module, each, options=options)
        steps(alone, other, 1, step)
    assert optimizer.run.digest == other.run.digest
    assert (optimizer.step_count, apart(ours, alone)) == (6, 0.0)
    assert apart(ours, theirs) < pair.tolerance


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_before_the_first_step_a_save_does_what_it_does_to_torchs_own(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm)
    theirs, ours = model(), model()
    reference, optimizer = pair.theirs(theirs.parameters()), pair.ours(ours.parameters())
    expected = get_optimizer_state_dict(theirs, reference)
    found = get_optimizer_state_dict(ours, optimizer)
    assert apart(ours, model()) == 0.0
    for name, entries in expected["state"].items():
        for key, value in entries.items():
            torch.testing.assert_close(torch.as_tensor(found["state"][name][key]), torch.as_tensor(value))
    get_optimizer_state_dict(ours, optimizer)
    assert optimizer.step_count == 1, "torch's own count says 1 as well: a step of zero gradients and lr 0"
    steps(theirs, reference, 3)
    steps(ours, optimizer, 3)
    assert apart(ours, theirs) < pair.tolerance
    assert state_apart(optimizer, reference) < pair.tolerance


@pytest.mark.parametrize("options", FLAT, ids=["nested", "flat"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_load_brings_the_state(shared: Service, algorithm: str, options: StateDictOptions) -> None:
    pair = made(shared, algorithm)
    ends: list[Any] = []
    for make in pair.both:
        module = model()
        first = make(module.named_parameters())
        steps(module, first, 4)
        saved = copy.deepcopy(get_optimizer_state_dict(module, first, options=options))
        again = model(seed=1)
        again.load_state_dict(module.state_dict())
        second = make(again.named_parameters())
        set_optimizer_state_dict(again, second, optim_state_dict=saved, options=options)
        for p, q in zip(module.parameters(), again.parameters(), strict=True):
            for name, value in first.state[p].items():
                assert relative(torch.as_tensor(second.state[q][name]), torch.as_tensor(value)) == 0.0, name
        steps(again, second, 3, 5)
        ends.append(again)
    assert apart(ends[1], ends[0]) < pair.tolerance


def test_through_files_and_back(shared: Service, tmp_path: Path) -> None:
    pair = made(shared, "adamw")
    module, alone = model(), model()
    optimizer, other = pair.ours(module.named_parameters()), pair.theirs(alone.named_parameters())
    steps(module, optimizer, 3)
    steps(alone, other, 6)
    weights, state = get_state_dict(module, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    again = model(seed=1)
    second = pair.ours(again.named_parameters())
    weights, state = get_state_dict(again, second)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved", no_dist=True)
    again.load_state_dict(weights)
    set_optimizer_state_dict(again, second, optim_state_dict=state)
    steps(again, second, 3, 4)
    assert apart(again, alone) < 1e-5
