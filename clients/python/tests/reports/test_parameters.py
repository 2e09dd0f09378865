"""Parameters that come, go and change while a training runs, and frozen ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside import ALGORITHMS, EXACT, HYPERPARAMETERS, apart, made, model, relative, steps
from torch import nn

from muond import MuondError
from muond.rest import Rest
from muond.torch import AdamW, suggest
from service import Service


def leaf(rows: int, columns: int = 3, seed: int = 0) -> nn.Parameter:
    torch.manual_seed(seed)
    return nn.Parameter(torch.randn(rows, columns))


def pull(optimizer: Any, parameters: list[nn.Parameter], count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        sum((p * p).sum() for p in parameters).backward()  # type: ignore[union-attr]
        optimizer.step()


def grown(value: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([value, torch.zeros(rows - value.shape[0], *value.shape[1:])])


@pytest.mark.parametrize("old_gradient", [True, False])
@pytest.mark.parametrize("rows", [4, 6, 2])
@pytest.mark.parametrize("algorithm", ["adamw", "sgd", "muon"])
def test_a_parameter_is_replaced_with_its_state(shared: Service, algorithm: str, rows: int, old_gradient: bool) -> None:
    """Densification and pruning: a new tensor takes the place, and the state that the program made for it."""
    pair = made(shared, algorithm)
    ends = []
    for make in pair.both:
        old, other = leaf(4), leaf(5, seed=1)
        optimizer = make([old, other])
        pull(optimizer, [old, other], 3)
        new = nn.Parameter(grown(old.detach(), rows) if rows >= 4 else old.detach()[:rows].clone())
        state = optimizer.state.pop(old, None)
        for name, value in state.items():
            if name != "step":
                state[name] = grown(value, rows) if rows >= 4 else value[:rows]
        optimizer.state[new] = state
        optimizer.param_groups[0]["params"][0] = new
        if not old_gradient:
            old.grad = None
        before = old.detach().clone()
        pull(optimizer, [new, other], 3)
        assert torch.equal(old, before), "nothing moves what is no parameter any more"
        ends.append((new, other, optimizer))
    for ours, theirs in zip(ends[1][:2], ends[0][:2], strict=True):
        assert relative(ours, theirs) < pair.tolerance
    for position in (0, 1):
        found, expected = (end[2].state[end[position]] for end in ends[::-1])
        assert all(relative(torch.as_tensor(found[n]), torch.as_tensor(expected[n])) < pair.tolerance for n in expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_new_parameter_begins_without_state_and_the_others_keep_theirs(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm)
    ends = []
    for make in pair.both:
        old, other = leaf(4), leaf(5, seed=1)
        optimizer = make([old, other])
        pull(optimizer, [old, other], 3)
        new = leaf(6, seed=2)
        optimizer.state.pop(old)
        optimizer.param_groups[0]["params"] = [other, new]
        pull(optimizer, [new, other], 2)
        ends.append((new, other))
    assert all(relative(a, b) < pair.tolerance for a, b in zip(ends[1], ends[0], strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_group_is_added_after_the_first_step(shared: Service, algorithm: str) -> None:
    """Backbone finetuning: a part of the model is thawed later, with a rate of its own."""
    pair = made(shared, algorithm)
    ends = []
    for make in pair.both:
        head, backbone = leaf(4), leaf(5, seed=1)
        optimizer = make([head])
        pull(optimizer, [head], 3)
        more = {} if make is pair.theirs else {"algorithm": algorithm}
        optimizer.add_param_group({"params": [backbone], **HYPERPARAMETERS[algorithm], **more, "lr": 0.005})
        pull(optimizer, [head, backbone], 3)
        ends.append((head, backbone, optimizer))
    assert all(relative(a, b) < pair.tolerance for a, b in zip(ends[1][:2], ends[0][:2], strict=True))
    assert len(ends[1][2].param_groups) == 2


def test_a_parameter_whose_data_has_another_shape_is_refused_where_its_state_has_not(shared: Service) -> None:
    pair = made(shared, "adamw")
    for make in pair.both:
        p, other = leaf(4), leaf(5, seed=1)
        optimizer = make([p, other])
        pull(optimizer, [p, other], 2)
        p.grad = None
        p.data = torch.ones(6, 3)
        before = other.detach().clone()
        with pytest.raises(RuntimeError, match=r"The size of tensor|has shape \[6, 3\], its state has \[4, 3\]"):
            pull(optimizer, [p, other], 1)
        if make is pair.ours:
            assert torch.equal(other, before), "nothing has moved"
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][name] = torch.zeros(6, 3)
    p, q = leaf(4), leaf(4)
    optimizer = pair.ours([p])
    reference = pair.theirs([q])
    for each, o in ((p, optimizer), (q, reference)):
        pull(o, [each], 2)
        each.grad = None
        each.data = torch.ones(6, 3)
        state = o.state[each]
        state["exp_avg"], state["exp_avg_sq"] = torch.full((6, 3), 0.5), torch.full((6, 3), 0.25)
        pull(o, [each], 2)
    assert relative(p, q) < 1e-5


def test_parameters_of_several_groups_change_places(shared: Service) -> None:
    pair = made(shared, "adamw")
    ends = []
    for make in pair.both:
        a, b = leaf(4), leaf(5, seed=1)
        optimizer = make([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.001}])
        pull(optimizer, [a, b], 3)
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]
        pull(optimizer, [a, b], 3)
        ends.append((a, b))
    assert all(relative(x, y) < 1e-5 for x, y in zip(ends[1], ends[0], strict=True))


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_a_parameter_that_was_taken_out_comes_back_with_its_state(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm)
    ends = []
    for make in pair.both:
        a, b = leaf(4), leaf(5, seed=1)
        optimizer = make([a, b])
        pull(optimizer, [a, b], 3)
        optimizer.state[b]["own"] = 1
        optimizer.param_groups[0]["params"] = [a]
        pull(optimizer, [a], 2)
        b.grad = None
        assert optimizer.state[b]["own"] == 1
        optimizer.param_groups[0]["params"] = [a, b]
        pull(optimizer, [a, b], 2)
        assert optimizer.state[b]["own"] == 1
        ends.append((a, b))
    assert all(relative(x, y) < 1e-5 for x, y in zip(ends[1], ends[0], strict=True))


def test_names_stay_with_their_parameters(shared: Service) -> None:
    module = model()
    optimizer = made(shared, "adamw").ours(module.named_parameters())
    steps(module, optimizer, 1)
    new = leaf(8, 8)
    optimizer.param_groups[0]["params"].insert(0, new)
    assert new.grad is None
    optimizer.zero_grad()
    (new.sum() + module(torch.ones(1, 8)).sum()).backward()
    optimizer.step()
    names = [p.name for p in optimizer.run.parameters]
    assert names == ["param.0", "0.weight", "2.weight"]
    assert [float(optimizer.state[p]["step"]) for p in (new, *module.parameters())] == [1, 2, 2]


def test_a_run_without_a_name_or_a_folder_goes_when_another_follows_it(shared: Service) -> None:
    a, b = leaf(4), leaf(5)
    optimizer = made(shared, "adamw").ours([a])
    pull(optimizer, [a], 1)
    names = []
    for _ in range(2):
        names.append(optimizer.run_name)
        optimizer.param_groups[0]["params"].append(b := leaf(5))
        pull(optimizer, [a, b], 1)
    assert re.fullmatch(r".*-[0-9a-f]{6}\.3", optimizer.run_name)
    with Rest(optimizer.run.address) as rest:
        for name in names:
            with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
                rest.run(name)


def test_a_named_run_with_checkpoints_stays_beside_the_one_that_follows_it(
    durable: Callable[..., Service], name: str
) -> None:
    service = durable()
    a = leaf(4)
    with AdamW([a], url=service.url, run=f"{name}.2") as taken:
        pull(taken, [a], 1)
    with AdamW([a], url=service.url, run=name, **EXACT) as optimizer:
        pull(optimizer, [a], 2)
        optimizer.checkpoint("mine")
        optimizer.add_param_group({"params": [b := leaf(5)]})
        with pytest.warns(
            UserWarning, match=f"its state goes on in run '{name}.3'. '{name}' and its checkpoints stay at step 2"
        ):
            pull(optimizer, [a, b], 1)
        saved = optimizer.state_dict()
        assert saved["muond"]["run"] == f"{name}.3"
        with Rest(optimizer.run.address) as rest:
            assert rest.checkpoint(name, "mine")["step"] == 2
    with AdamW([{"params": [a]}, {"params": [b]}], url=service.url, run=name, **EXACT) as again:
        again.load_state_dict(saved)
        assert again.run_name == f"{name}.3", "the dictionary's run has this one's name"


def test_what_cannot_be_declared_again_moves_nothing(shared: Service) -> None:
    a = leaf(4)
    optimizer = made(shared, "muon").ours([a])
    pull(optimizer, [a], 1)
    run, before = optimizer.run_name, a.detach().clone()
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    b = leaf(5)
    optimizer.param_groups[0]["params"].append(b)
    optimizer.state[b]["momentum_buffer"] = torch.zeros(2, 2)
    with pytest.raises(MuondError, match="SHAPE_MISMATCH"):
        pull(optimizer, [a, b], 1)
    assert torch.equal(a, before)
    assert optimizer.run_name == run
    del optimizer.state[b]
    pull(optimizer, [a, b], 1)
    assert not torch.equal(a, before)


def test_overlap_sends_what_was_added(shared: Service) -> None:
    pair = made(shared, "adamw")
    ends = []
    for make in (pair.theirs, lambda params: pair.ours(params, overlap=True)):
        a, b = leaf(4), leaf(5)
        optimizer = make([a])
        pull(optimizer, [a], 2)
        optimizer.zero_grad()
        optimizer.add_param_group({"params": [b]})
        pull(optimizer, [a, b], 3)
        ends.append((a, b, optimizer))
    assert all(relative(x, y) < 1e-5 for x, y in zip(ends[1][:2], ends[0][:2], strict=True))
    a, b, optimizer = ends[1]
    optimizer.zero_grad()
    ((a * a).sum() + (b * b).sum()).backward()
    optimizer.param_groups[1]["params"] = [leaf(5)]
    with pytest.raises(RuntimeError, match="change them before backward"):
        optimizer.step()


# Frozen parameters


def test_a_frozen_parameter_is_declared_when_it_thaws(shared: Service) -> None:
    pair = made(shared, "adamw")
    ends = []
    for make in pair.both:
        module = model()
        first = module[0].weight
        first.requires_grad_(False)
        optimizer = make(module.named_parameters())
        steps(module, optimizer, 2)
        if make is pair.ours:
            assert [p.name for p in optimizer.run.parameters] == ["2.weight"]
            assert [len(optimizer.state[p]) for p in module.parameters()] == [0, 3]
            assert list(optimizer.state_dict()["state"]) == [1]
        first.requires_grad_(True)
        steps(module, optimizer, 2, 3)
        first.requires_grad_(False)
        optimizer.zero_grad()
        steps(module, optimizer, 2, 5)
        ends.append((module, optimizer))
    assert apart(ends[1][0], ends[0][0]) < 1e-5
    assert [float(ends[1][1].state[p]["step"]) for p in ends[1][0].parameters()] == [2, 6]


def test_a_state_of_a_frozen_parameter_is_kept(shared: Service) -> None:
    pair = made(shared, "adamw")
    module = model()
    optimizer = pair.ours(module.parameters())
    steps(module, optimizer, 2)
    saved = optimizer.state_dict()
    again = model()
    again[0].weight.requires_grad_(False)
    second = pair.ours(again.parameters())
    second.load_state_dict(saved)
    assert list(second.state_dict()["state"]) == [0, 1]
    third = pair.ours((other := model()).parameters())
    other[0].weight.requires_grad_(False)
    steps(other, third, 1)
    third.load_state_dict(saved)
    assert list(third.state_dict()["state"]) == [0, 1]


def test_a_step_with_every_parameter_frozen_is_none(shared: Service) -> None:
    module = model()
    module.requires_grad_(False)
    optimizer = made(shared, "adamw").ours(module.parameters())
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.0) == 3.0
    module.requires_grad_(True)
    steps(module, optimizer, 1)
    assert optimizer.step_count == 1
    assert len(optimizer.run.parameters) == 2


def test_suggest_says_what_is_frozen() -> None:
    module = model()
    module[0].weight.requires_grad_(False)
    table = str(suggest(module, quiet=True))
    assert [line.endswith("matrix, frozen") for line in table.splitlines()[1:]] == [True, False]


# What was kept of a run with other parameters


def test_a_checkpoint_of_other_parameters_is_not_gone_back_to(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    a, b = leaf(4), leaf(5)
    with AdamW([a], url=service.url, run=name, state="checkpoint", keep="cpu") as optimizer:
        pull(optimizer, [a], 1)
        optimizer.checkpoint()
        saved = optimizer.state_dict()
        optimizer.param_groups[0]["params"].append(b)
        with pytest.raises(ValueError, match="loaded state dict contains a parameter group"):
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["params"] = [b]
        with pytest.raises(ValueError, match=f"the parameters are not those of run '{name}' any more"):
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["params"] = [a, b]
        with pytest.warns(UserWarning, match=f"its state goes on in run '{name}.2'"):
            pull(optimizer, [a, b], 1)
        with pytest.raises(MuondError, match="has no weights kept here"):
            optimizer.rollback()


def test_a_checkpoint_is_gone_back_to_in_the_middle_of_a_step(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    module = model()
    with AdamW(module.parameters(), url=service.url, run=name, state="checkpoint", overlap=True) as optimizer:
        steps(module, optimizer, 1)
        saved = optimizer.state_dict()
        optimizer.zero_grad()
        module(torch.ones(1, 8)).sum().backward()
        optimizer.load_state_dict(saved)
        assert optimizer.step_count == 1
        steps(module, optimizer, 1, 2)
        assert optimizer.step_count == 2


def test_where_nothing_was_computed_yet_nothing_is_carried_over(shared: Service) -> None:
    a, b = leaf(4), leaf(5)
    optimizer = made(shared, "adamw").ours([a])
    optimizer.open()
    optimizer.add_param_group({"params": [b]})
    pull(optimizer, [a, b], 1)
    assert optimizer.step_count == 1


def test_a_service_without_room_for_both_runs_says_so_before_anything_moves(
    start: Callable[..., Service], name: str
) -> None:
    service = start("--max-runs", "1")
    a, b = leaf(4), leaf(5)
    with AdamW([a], url=service.url, run=name) as optimizer:
        pull(optimizer, [a], 1)
        before = a.detach().clone()
        optimizer.add_param_group({"params": [b]})
        with pytest.raises(MuondError, match="OVER_CAPACITY"):
            pull(optimizer, [a, b], 1)
        assert torch.equal(a, before)
        optimizer.param_groups.pop()
        pull(optimizer, [a], 1)
        assert (optimizer.run_name, optimizer.step_count) == (name, 2)


def test_a_hook_of_a_parameter_that_was_taken_out_sends_nothing(shared: Service) -> None:
    a, b = leaf(4), leaf(5)
    optimizer = made(shared, "adamw").ours([a, b], overlap=True)
    pull(optimizer, [a, b], 1)
    optimizer.param_groups[0]["params"] = [a]
    optimizer.zero_grad()
    before = b.detach().clone()
    # What was computed last has its gradient first.
    ((a * a).sum() + (b * b).sum()).backward()
    optimizer.step()
    assert torch.equal(b, before)
    assert len(optimizer.run.parameters) == 1
