"""``optimizer.state`` is the state: it is read when it is looked at, and what is done to it is done."""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from beside import ALGORITHMS, apart, made, model, state_apart, steps
from torch import nn

from muond import MuondError
from service import Service

Change = Callable[[Any], None]


def parameters(optimizer: Any) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def zero_in_place(optimizer: Any) -> None:
    for p in parameters(optimizer):
        for name, value in optimizer.state[p].items():
            if name != "step":
                value.zero_()


def zero_all(optimizer: Any) -> None:
    """The count as well: what begins anew begins where torch does."""
    for p in parameters(optimizer):
        for value in optimizer.state[p].values():
            value.zero_()


def put_back_what_is_there(optimizer: Any) -> None:
    """Nothing changes."""
    optimizer.state = optimizer.state
    for p in parameters(optimizer):
        optimizer.state[p] = optimizer.state[p]


def zero_through_data(optimizer: Any) -> None:
    for p in parameters(optimizer):
        for name, value in optimizer.state[p].items():
            if name != "step":
                value.data.mul_(0.5)


def zero_through_numpy(optimizer: Any) -> None:
    for p in parameters(optimizer):
        for name, value in optimizer.state[p].items():
            if name != "step":
                value.numpy()[:] *= 0.5


def prune(optimizer: Any) -> None:
    for p in parameters(optimizer):
        if len(optimizer.state[p]) == 0:
            continue
        for name, value in optimizer.state[p].items():
            if name != "step":
                optimizer.state[p][name] = value * (torch.arange(value.numel()).view(value.shape) % 3 > 0)


def pop(optimizer: Any) -> None:
    for p in parameters(optimizer):
        assert p in optimizer.state
        optimizer.state.pop(p, None)
        assert p not in optimizer.state


def delete_one(optimizer: Any) -> None:
    del optimizer.state[next(parameters(optimizer))]


def clear(optimizer: Any) -> None:
    optimizer.state.clear()


def replace(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def replace_with_some(optimizer: Any) -> None:
    first, *_ = parameters(optimizer)
    optimizer.state = defaultdict(dict, {first: dict(optimizer.state[first])})


def exchange(optimizer: Any) -> None:
    first, second = parameters(optimizer)
    optimizer.state[first], optimizer.state[second] = optimizer.state[second], optimizer.state[first]


def pop_change_and_put_back(optimizer: Any) -> None:
    for p in parameters(optimizer):
        entries = optimizer.state.pop(p)
        for name, value in entries.items():
            if name != "step":
                value.mul_(0.25)
        optimizer.state[p] = entries


def to_the_device(optimizer: Any) -> None:
    """As Lightning moves an optimizer's state: nothing changes."""
    for p, entries in optimizer.state.items():
        optimizer.state[p] = {name: value.to(p.device) for name, value in entries.items()}


CHANGES: list[Change] = [
    zero_in_place,
    zero_all,
    put_back_what_is_there,
    zero_through_data,
    zero_through_numpy,
    prune,
    pop,
    delete_one,
    clear,
    replace,
    replace_with_some,
    exchange,
    pop_change_and_put_back,
    to_the_device,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_done_to_the_state_is_done_as_in_torch(shared: Service, algorithm: str, change: Change) -> None:
    pair = made(shared, algorithm)
    theirs, ours, untouched = model(), model(), model()
    reference, optimizer, other = (
        pair.theirs(theirs.parameters()),
        pair.ours(ours.parameters()),
        pair.theirs(untouched.parameters()),
    )
    for module, each in ((theirs, reference), (ours, optimizer)):
        steps(module, each, 5)
        change(each)
        steps(module, each, 3, 6)
    steps(untouched, other, 8)
    assert apart(ours, theirs) < pair.tolerance
    assert state_apart(optimizer, reference) < pair.tolerance
    if change not in (to_the_device, put_back_what_is_there):
        assert apart(theirs, untouched) > 4 * pair.tolerance, "the change makes a difference"
    optimizer.close(delete=True)


def test_a_look_that_changes_nothing_sends_nothing(shared: Service) -> None:
    pair = made(shared, "adamw")
    alone, ours = model(), model()
    other, optimizer = pair.ours(alone.parameters()), pair.ours(ours.parameters())
    steps(alone, other, 4)
    for step in range(1, 5):
        steps(ours, optimizer, 1, step)
        assert len(optimizer.state) == 2
        to_the_device(optimizer)
        copied = copy.deepcopy(optimizer.state)
        assert isinstance(copied, defaultdict)
    assert optimizer.run.digest == other.run.digest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_state_has_torchs_names_and_values(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm)
    theirs, ours = model(), model()
    reference, optimizer = pair.theirs(theirs.parameters()), pair.ours(ours.parameters())
    for each in (reference, optimizer):
        assert not each.state
        assert len(each.state) == 0
        assert list(each.state) == []
    steps(theirs, reference, 4)
    steps(ours, optimizer, 4)
    assert bool(optimizer.state)
    assert [id(p) for p in optimizer.state] == [id(p) for p in ours.parameters()]
    assert state_apart(optimizer, reference) < pair.tolerance
    assert all(value.device == p.device for p, entries in optimizer.state.items() for value in entries.values())


def test_whether_there_is_state_is_known_without_reading_it(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = made(shared, "adamw").ours((module := model()).parameters())
    steps(module, optimizer, 1)
    monkeypatch.setattr("muond.torch.home.read_state", lambda *_: pytest.fail("the tensors were read"))
    first = module[0].weight
    assert optimizer.state
    assert first in optimizer.state
    assert "other" not in optimizer.state
    optimizer.state[first]["own"] = 1
    assert len(optimizer.state) == 2
    assert optimizer.state[first]["own"] == 1
    with pytest.raises(KeyError, match="nothing"):
        optimizer.state[first]["nothing"]


def test_one_request_reads_the_state_of_all_parameters(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    import muond.torch.home

    reads: list[int] = []
    read = muond.torch.home.read_state
    monkeypatch.setattr("muond.torch.home.read_state", lambda *given: (reads.append(1), read(*given))[1])
    optimizer = made(shared, "adamw").ours((module := model()).parameters())
    for step in (1, 2):
        steps(module, optimizer, 1, step)
        for p in module.parameters():
            assert float(optimizer.state[p]["step"]) == step
            assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
        assert len(reads) == step


def test_what_is_not_there_is_said_without_the_tensor_in_it(shared: Service) -> None:
    optimizer = made(shared, "adamw").ours((module := model()).parameters())
    with pytest.raises(KeyError, match=r"no a parameter of shape \[8, 8\]|a parameter of shape \[8, 8\]"):
        del optimizer.state[module[0].weight]
    with pytest.raises(KeyError, match="'other'"):
        optimizer.state.pop("other")
    assert optimizer.state.pop("other", 3) == 3
    assert optimizer.state.get("other") is None
    assert optimizer.state.setdefault("other", {"x": 1}) == optimizer.state.get("other") == {"x": 1}
    assert optimizer.state.setdefault("other") == {"x": 1}
    assert optimizer.state.setdefault(module[0].weight) == {}
    del optimizer.state["other"], optimizer.state[module[0].weight]
    assert "0 keys" in repr(optimizer.state)


def test_entries_of_the_program_survive_steps_and_a_state_dict(shared: Service) -> None:
    pair = made(shared, "adamw")
    for make in pair.both:
        module = model()
        optimizer = make(module.parameters())
        first = module[0].weight
        steps(module, optimizer, 1)
        optimizer.state[first]["slow"] = torch.ones(2, 2)
        optimizer.state["seen"] = {"batches": 3}
        steps(module, optimizer, 1, 2)
        assert torch.equal(optimizer.state[first]["slow"], torch.ones(2, 2))
        optimizer.state[first]["slow"].mul_(2)
        steps(module, optimizer, 1, 3)
        saved = optimizer.state_dict()
        assert torch.equal(saved["state"][0]["slow"], torch.full((2, 2), 2.0))
        assert saved["state"]["seen"] == {"batches": 3}
        assert "slow" not in saved["state"][1]
        again = model()
        second = make(again.parameters())
        second.load_state_dict(copy.deepcopy(saved))
        assert torch.equal(second.state[again[0].weight]["slow"], torch.full((2, 2), 2.0))
        assert float(second.state[again[0].weight]["step"]) == 3
        assert second.state["seen"] == {"batches": 3}


def test_state_that_is_written_before_the_first_step_is_what_it_begins_with(shared: Service) -> None:
    pair = made(shared, "adamw")
    modules = [model(), model()]
    for module, make in zip(modules, pair.both, strict=True):
        optimizer = make(module.parameters())
        for p in module.parameters():
            optimizer.state[p] = {
                "step": torch.tensor(5.0),
                "exp_avg": torch.full_like(p, 0.25),
                "exp_avg_sq": torch.full_like(p, 0.5),
            }
        steps(module, optimizer, 2)
    assert apart(modules[1], modules[0]) < 1e-5


def test_a_first_step_that_cannot_begin_can_be_taken_again(shared: Service, name: str) -> None:
    module = model()
    optimizer = made(shared, "sgd").ours(module.parameters(), run=name)
    optimizer.state[module[0].weight]["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(MuondError, match="SHAPE_MISMATCH"):
        steps(module, optimizer, 1)
    assert optimizer.step_count == 0
    del optimizer.state[module[0].weight]["momentum_buffer"]
    steps(module, optimizer, 1)
    assert optimizer.step_count == 1


def test_a_state_that_no_optimizer_could_go_on_from_is_refused_before_anything_moves(shared: Service) -> None:
    optimizer = made(shared, "adamw").ours((module := model()).named_parameters())
    steps(module, optimizer, 1)
    first = module[0].weight
    before = [p.detach().clone() for p in module.parameters()]
    for entries, words in (
        ({"step": torch.tensor(1.0), "exp_avg": torch.zeros(8, 8)}, "'0.weight' has 'exp_avg' but no 'exp_avg_sq'"),
        ({"exp_avg": torch.zeros(8, 8), "exp_avg_sq": torch.zeros(8, 8)}, "no 'step'"),
        ({"step": 1.5, "exp_avg": torch.zeros(8, 8), "exp_avg_sq": torch.zeros(8, 8)}, "has step 1.5"),
        ({"step": 0, "exp_avg": torch.ones(8, 8), "exp_avg_sq": torch.zeros(8, 8)}, "has step 0 and"),
        ({"step": 3}, "no tensor"),
    ):
        optimizer.state[first] = entries
        with pytest.raises(ValueError, match=words):
            steps(module, optimizer, 1, 2)
    optimizer.state[first] = {"step": 1, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    with pytest.raises(MuondError, match="SHAPE_MISMATCH"):
        steps(module, optimizer, 1, 2)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    optimizer.state[first] = {}
    steps(module, optimizer, 1, 2)
    assert float(optimizer.state[first]["step"]) == 1


def test_a_change_of_a_tensor_that_is_no_state_any_more_is_refused(shared: Service) -> None:
    optimizer = made(shared, "muon").ours((module := model()).parameters())
    steps(module, optimizer, 1)
    held = optimizer.state[module[0].weight]["momentum_buffer"]
    steps(module, optimizer, 1, 2)
    held.zero_()
    with pytest.raises(RuntimeError, match="this is an old copy"):
        steps(module, optimizer, 1, 3)
    steps(module, optimizer, 1, 3)


def test_entries_that_are_held_over_a_step_are_those_of_now(shared: Service) -> None:
    optimizer = made(shared, "adamw").ours((module := model()).parameters())
    steps(module, optimizer, 1)
    entries = optimizer.state[module[0].weight]
    assert float(entries["step"]) == 1
    steps(module, optimizer, 1, 2)
    assert float(entries["step"]) == 2
    entries["exp_avg"].zero_()
    saved = optimizer.state_dict()
    assert float(saved["state"][0]["exp_avg"].abs().max()) == 0.0


def test_entries_do_what_a_dict_does(shared: Service) -> None:
    optimizer = made(shared, "sgd").ours((module := model()).parameters())
    steps(module, optimizer, 1)
    entries = optimizer.state[module[0].weight]
    names = {"step", "momentum_buffer"}
    assert entries.setdefault("own", 1) == entries.get("own") == 1
    assert entries.setdefault("step", 9) == 1
    assert set(entries.keys()) == set(entries.copy()) == set({**entries}) == names | {"own"}
    assert len(entries.values()) == 3
    assert "own" in repr(entries)
    assert entries.get("nothing", 5) == 5
    entries.update({"more": 2}, most=3)
    assert entries.pop("most") == 3
    assert entries.pop("most", None) is None
    assert set(entries | {"x": 1}) == names | {"own", "more", "x"}
    assert set({"x": 1} | entries) == names | {"own", "more", "x"}
    assert entries == dict(entries)
    assert type(copy.copy(entries)) is dict
    entries.popitem()
    entries.clear()
    assert len(entries) == 0
    steps(module, optimizer, 1, 2)
    assert float(optimizer.state[module[0].weight]["step"]) == 1
    assert float(optimizer.state[module[2].weight]["step"]) == 2
    assert optimizer.state.copy().keys() == set(module.parameters())


def test_a_state_is_not_looked_at_in_the_middle_of_a_step(shared: Service) -> None:
    optimizer = made(shared, "adamw").ours((module := model()).parameters(), overlap=True)
    backward_one(module)
    with pytest.raises(RuntimeError, match=r"step 1 of run .* is under way"):
        len(optimizer.state)
    optimizer.step()
    assert len(optimizer.state) == 2


def test_a_state_does_not_outlive_its_optimizer(shared: Service) -> None:
    state = made(shared, "adamw").ours(model().parameters()).state
    gc.collect()
    with pytest.raises(RuntimeError, match="the optimizer of this state is gone"):
        len(state)


def backward_one(module: nn.Module) -> None:
    module(torch.ones(2, 8)).square().mean().backward()


def test_a_state_that_is_changed_under_a_step_is_refused(shared: Service) -> None:
    optimizer = made(shared, "adamw").ours((module := model()).parameters(), overlap=True)
    backward_one(module)
    optimizer.step()
    entries = optimizer.state[module[0].weight]
    assert len(entries) == 3
    optimizer.zero_grad()
    backward_one(module)
    entries["exp_avg"] = torch.zeros(8, 8)
    with pytest.raises(RuntimeError, match="change them before backward"):
        optimizer.step()


def test_a_run_that_is_gone_on_with_has_its_state_at_once(shared: Service, name: str) -> None:
    pair = made(shared, "adamw")
    module = model()
    optimizer = pair.ours(module.parameters(), run=name)
    steps(module, optimizer, 2)
    optimizer.close()
    again = pair.ours(module.parameters(), run=name, mode="resume")
    assert float(again.state[module[0].weight]["step"]) == 2
    again.close()
    fresh = pair.ours(module.parameters(), run=name, mode="resume")
    fresh.state = defaultdict(dict)
    steps(module, fresh, 1, 3)
    assert float(fresh.state[module[0].weight]["step"]) == 1
