"""load_state_dict: what a dictionary says is what the optimizer is, whatever it was before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from beside import ALGORITHMS, EXACT, apart, made, model, relative, state_apart, steps
from models import saved_and_loaded
from torch import nn

from muond import MuondError
from muond.rest import Rest
from muond.torch import AdamW, Muon, MuonClip, Optimizer
from muond.transport.address import endpoint
from service import Service, damage

Edit = Callable[[dict[str, Any]], dict[str, Any]]


def shifted(saved: dict[str, Any]) -> dict[str, Any]:
    """Ids are only ids: another program may begin elsewhere."""
    groups = [{**group, "params": [each + 10 for each in group["params"]]} for group in saved["param_groups"]]
    return {"state": {key + 10: entries for key, entries in saved["state"].items()}, "param_groups": groups}


def permuted(saved: dict[str, Any]) -> dict[str, Any]:
    """The ids of a group in another order: the first parameter's state is that of id 1."""
    groups = [{**group, "params": group["params"][::-1]} for group in saved["param_groups"]]
    return {"state": saved["state"], "param_groups": groups}


def named(saved: dict[str, Any]) -> dict[str, Any]:
    """Ids that are names, as torch.distributed.checkpoint has them."""
    names = {0: "0.weight", 1: "2.weight"}
    groups = [{**group, "params": [names[each] for each in group["params"]]} for group in saved["param_groups"]]
    return {"state": {names[key]: entries for key, entries in saved["state"].items()}, "param_groups": groups}


def state_first(saved: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter only."""
    return {**saved, "state": {0: saved["state"][0]}}


@pytest.mark.parametrize("edit", [shifted, permuted, named, state_first], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_states_belong_to_parameters_as_in_torch(shared: Service, algorithm: str, edit: Edit) -> None:
    pair = made(shared, algorithm)
    theirs, ours = model(), model()
    ends = []
    for module, make in zip((theirs, ours), pair.both, strict=True):
        first = make(module.parameters())
        steps(module, first, 4)
        again = model()
        again.load_state_dict(module.state_dict())
        second = make(again.parameters())
        second.load_state_dict(edit(copy.deepcopy(first.state_dict())))
        steps(again, second, 3, 5)
        ends.append((again, second))
    assert apart(ends[1][0], ends[0][0]) < pair.tolerance
    assert state_apart(ends[1][1], ends[0][1]) < pair.tolerance


def test_where_both_have_names_names_decide(shared: Service) -> None:
    pair = made(shared, "adamw")
    module = model()
    first = pair.ours(module.named_parameters())
    steps(module, first, 3)
    saved = first.state_dict()
    backwards = pair.ours(list(module.named_parameters())[::-1])
    backwards.load_state_dict(copy.deepcopy(saved))
    for p in module.parameters():
        assert torch.equal(backwards.state[p]["exp_avg"], first.state[p]["exp_avg"])
    for groups in (
        [{**saved["param_groups"][0], "param_names": ["0.weight", "4.weight"]}],
        [{**saved["param_groups"][0], "params": ["0.weight", "4.weight"]}],
    ):
        groups[0].setdefault("param_names", None)
        if groups[0]["params"] != [0, 1]:
            del groups[0]["param_names"]
        with pytest.raises(ValueError, match=r"has '4.weight', this optimizer's has '2.weight'"):
            backwards.load_state_dict({**saved, "state": {}, "param_groups": groups})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda s: {**s, "param_groups": s["param_groups"] * 2},
            "loaded state dict has a different number of parameter groups",
        ),
        (
            lambda s: {**s, "param_groups": [{**s["param_groups"][0], "params": [0]}]},
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
        ),
        (lambda s: {**s, "state": {7: s["state"][0]}}, "a state of parameter 7, which none of its param_groups has"),
        (lambda s: {**s, "param_groups": [{**s["param_groups"][0], "lr": -1.0}]}, "Invalid learning rate"),
        (
            lambda s: {**s, "param_groups": [{**s["param_groups"][0], "amsgrad": True}]},
            "make the optimizer with amsgrad=True",
        ),
        (
            lambda s: {**s, "param_groups": [{**s["param_groups"][0], "algorithm": "muon"}]},
            "is muon, this optimizer's is adamw",
        ),
        (lambda s: {**s, "state": {0: {"step": 1, "exp_avg": torch.zeros(8, 8)}}}, "no 'exp_avg_sq'"),
        (
            lambda s: {**s, "state": {0: {**s["state"][0], "exp_avg": torch.zeros(2)}}},
            "SHAPE_MISMATCH",
        ),
        (
            lambda s: {**s, "state": {0: {**s["state"][0], "exp_avg": torch.zeros(8, 8, dtype=torch.complex64)}}},
            "DTYPE_UNSUPPORTED",
        ),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_load_that_fails_changes_nothing(shared: Service, edit: Edit, words: str, begun: bool) -> None:
    module, alone = model(), model()
    pair = made(shared, "adamw")
    optimizer, other, third = (
        pair.ours(module.parameters()),
        pair.ours(alone.parameters()),
        pair.ours((m := model()).parameters()),
    )
    steps(m, third, 2, 50)
    saved = third.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    third.close()
    if begun:
        steps(module, optimizer, 2)
    with pytest.raises((ValueError, MuondError), match=words):
        optimizer.load_state_dict(edit(copy.deepcopy(saved)))
    assert optimizer.param_groups[0]["lr"] == 0.02
    steps(module, optimizer, 3, 3 if begun else 1)
    steps(alone, other, 5 if begun else 3)
    assert apart(module, alone) == 0.0
    assert optimizer.run.digest == other.run.digest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_dictionary_from_before_the_training_is_an_optimizer_without_state(shared: Service, algorithm: str) -> None:
    """A learning rate finder keeps the dictionaries, trains at all rates, and restores them."""
    pair = made(shared, algorithm)
    theirs, ours = model(), model()
    for module, make in ((theirs, pair.theirs), (ours, pair.ours)):
        optimizer = make(module.parameters())
        weights, before = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 0.5
        steps(module, optimizer, 20, 100)
        module.load_state_dict(weights)
        optimizer.load_state_dict(before)
        assert len(optimizer.state) == 0
        assert optimizer.state_dict()["state"] == {}
        steps(module, optimizer, 3)
    assert apart(ours, theirs) < pair.tolerance


def test_the_same_with_checkpoints_and_with_a_run_that_is_gone_on_with(
    durable: Callable[..., Service], name: str
) -> None:
    service = durable()
    pair = made(service, "adamw")
    theirs, ours = model(), model()
    steps(theirs, pair.theirs(theirs.parameters()), 3)
    optimizer = pair.ours(ours.parameters(), run=name, state="checkpoint")
    weights, before = copy.deepcopy(ours.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(ours, optimizer, 5, 100)
    for again in (optimizer, None):
        if again is None:
            optimizer.close()
            again = pair.ours(ours.parameters(), run=name, mode="resume")
        ours.load_state_dict(weights)
        again.load_state_dict(before)
        steps(ours, again, 3)
        assert apart(ours, theirs) < 1e-5


@pytest.mark.parametrize("takeover", [False, True])
def test_a_state_of_an_optimizer_that_lives_is_copied(shared: Service, takeover: bool) -> None:
    pair = made(shared, "adamw")
    module = model()
    one = pair.ours(module.parameters(), takeover=takeover)
    steps(module, one, 3)
    copied = model()
    copied.load_state_dict(module.state_dict())
    two = pair.ours(copied.parameters(), takeover=takeover)
    two.load_state_dict(one.state_dict())
    assert two.run_name != one.run_name
    for first, module_, optimizer in ((4, module, one), (4, copied, two)):
        steps(module_, optimizer, 3, first)
    assert apart(copied, module) == 0.0
    assert (one.step_count, two.step_count) == (6, 3)


def test_a_state_whose_run_another_process_has_is_copied_too(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = made(shared, "adamw")
    module = model()
    one = pair.ours(module.parameters())
    steps(module, one, 3)
    saved = one.state_dict()
    monkeypatch.setattr("muond.torch.living._owners", {})
    two = pair.ours(model().parameters())
    two.load_state_dict(saved)
    assert two.run_name != one.run_name
    three = AdamW(model().parameters(), url=shared.url, update_dtype="bfloat16")
    one.close()
    three.load_state_dict(saved)
    assert three.run_name not in (one.run_name, two.run_name), "that run has other parameters"
    assert torch.equal(three.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_dictionary_is_its_content_wherever_it_was_made(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm)
    theirs, ours = model(), model()
    ends = []
    for module, make in ((theirs, pair.theirs), (ours, pair.ours)):
        optimizer = make(module.parameters())
        steps(module, optimizer, 4)
        saved = copy.deepcopy(optimizer.state_dict())
        for entries in saved["state"].values():
            for key in entries.keys() - {"step"}:
                entries[key] = torch.zeros_like(entries[key])
        optimizer.load_state_dict(saved)
        steps(module, optimizer, 3, 5)
        ends.append(optimizer)
    assert apart(ours, theirs) < pair.tolerance
    assert state_apart(ends[1], ends[0]) < pair.tolerance


def test_content_that_the_service_has_already_is_not_sent(shared: Service) -> None:
    pair = made(shared, "adamw")
    module = model()
    optimizer = pair.ours(module.parameters())
    steps(module, optimizer, 3)
    digest = optimizer.run.digest
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert optimizer.run.digest == digest
    saved = optimizer.state_dict()
    optimizer.state.clear()
    optimizer.load_state_dict(saved)
    assert float(optimizer.state[module[0].weight]["step"]) == 3, "the loaded state counts, not what was wanted before"


@pytest.mark.parametrize("kept", ["ema", "heavy_ball"])
@pytest.mark.parametrize("form", ["ema", "heavy_ball"])
@pytest.mark.parametrize("begun", [False, True])
def test_the_form_of_the_momentum_is_in_the_groups(shared: Service, form: str, kept: str, begun: bool) -> None:
    """A program that passes on ``state`` and ``param_groups`` alone loses nothing, and with another momentum neither."""
    module = model()
    options: Any = {"url": shared.url, **EXACT}
    first = Muon(module.parameters(), lr=0.05, momentum=0.9, momentum_form=form, **options)
    steps(module, first, 4)
    saved = copy.deepcopy({key: first.state_dict()[key] for key in ("state", "param_groups")})
    again = model()
    second = Muon(again.parameters(), lr=0.05, momentum=0.8, momentum_form=kept, **options)
    if begun:
        steps(again, second, 1)
    again.load_state_dict(module.state_dict())
    second.load_state_dict(saved)
    assert second.param_groups[0]["momentum_form"] == kept
    assert second.param_groups[0]["momentum"] == 0.9
    scale = {("ema", "heavy_ball"): 10.0, ("heavy_ball", "ema"): 0.1}.get((form, kept), 1.0)
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        assert relative(second.state[q]["momentum_buffer"], scale * first.state[p]["momentum_buffer"]) < 1e-6
    steps(module, first, 3, 5)
    steps(again, second, 3, 5)
    assert apart(again, module) < 1e-5


def test_muonclips_form_is_in_its_groups(shared: Service) -> None:
    module = model()
    first = MuonClip(module.parameters(), lr=0.05, url=shared.url, **EXACT)
    steps(module, first, 4)
    saved = {key: first.state_dict()[key] for key in ("state", "param_groups")}
    again = model()
    again.load_state_dict(module.state_dict())
    second = MuonClip(again.parameters(), lr=0.05, url=shared.url, **EXACT)
    second.load_state_dict(saved)
    assert torch.equal(
        second.state[again[0].weight]["momentum_buffer"], first.state[module[0].weight]["momentum_buffer"]
    )


@pytest.mark.parametrize(
    ("algorithm", "key", "words"), [("sgd", "dampening", "takes it"), ("adam", "decoupled_weight_decay", "AdamW")]
)
def test_a_weight_decay_of_torch_that_means_something_else_is_refused(
    shared: Service, algorithm: str, key: str, words: str
) -> None:
    pair = made(shared, algorithm)
    theirs = pair.theirs((module := model()).parameters())
    steps(module, theirs, 1)
    theirs.param_groups[0].update({"weight_decay": 0.1, key: 1})
    with pytest.raises(ValueError, match=words):
        pair.ours(model().parameters()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("algorithm", ["adam", "rmsprop"])
def test_a_weight_decay_of_the_gradient_is_torchs(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm, weight_decay=0.5)
    ends = []
    for make in (pair.theirs, lambda params: pair.ours(params, overlap=True)):
        module = model()
        first = make(module.parameters())
        steps(module, first, 3)
        again = copy.deepcopy(module)
        second = make(again.parameters())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.param_groups[0]["maximize"] = True
        steps(again, second, 3, 4)
        ends.append(again)
    assert apart(ends[1], ends[0]) < 1e-5


def test_torchs_own_state_in_float64_and_without_optional_parts_is_taken(shared: Service) -> None:
    theirs, ours = model().double(), model().double()
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.02)
    steps_double(theirs, reference, 3)
    ours.load_state_dict(theirs.state_dict())
    optimizer = AdamW(ours.parameters(), lr=0.02, url=shared.url, **EXACT)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    steps_double(theirs, reference, 2, 4)
    steps_double(ours, optimizer, 2, 4)
    assert apart(ours, theirs) < 1e-5
    plain, mine = model(), model()
    reference = torch.optim.RMSprop(plain.parameters(), lr=0.01)
    steps(plain, reference, 3)
    mine.load_state_dict(plain.state_dict())
    without = Optimizer([{"params": list(mine.parameters()), "algorithm": "rmsprop"}], url=shared.url, **EXACT)
    without.load_state_dict(reference.state_dict())
    steps(plain, reference, 2, 4)
    steps(mine, without, 2, 4)
    assert apart(mine, plain) < 1e-5


def steps_double(module: nn.Module, optimizer: Any, count: int, first: int = 1) -> None:
    for step in range(first, first + count):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        module(torch.randn(16, 8, generator=generator).double()).square().mean().backward()
        optimizer.step()


def test_hooks_of_state_dicts_see_and_change_what_is_saved_and_loaded(shared: Service) -> None:
    for make in made(shared, "adamw").both:
        module = model()
        optimizer = make(module.parameters())
        steps(module, optimizer, 2)
        seen: list[str] = []
        optimizer.register_state_dict_pre_hook(lambda _, seen=seen: seen.append("before save"))
        optimizer.register_state_dict_post_hook(lambda _, saved, seen=seen: seen.append(f"saved {len(saved['state'])}"))
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
        saved = optimizer.state_dict()
        assert saved["more"] == 1

        def less(_: Any, given: dict[str, Any], seen: list[str] = seen) -> dict[str, Any]:
            seen.append("before load")
            return {**given, "state": {}}

        optimizer.register_load_state_dict_pre_hook(less)
        optimizer.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append(f"loaded {len(o.state)}"))
        optimizer.load_state_dict(saved)
        assert seen == ["before save", "saved 2", "before load", "loaded 0"]


def test_a_closed_optimizer_loads_nothing(shared: Service) -> None:
    optimizer = made(shared, "adamw").ours(model().parameters())
    saved = optimizer.state_dict()
    optimizer.close()
    with pytest.raises(MuondError, match="was closed"):
        optimizer.load_state_dict(saved)


def test_a_half_step_is_over_when_a_state_is_loaded(shared: Service) -> None:
    module = model()
    optimizer = made(shared, "adamw").ours(module.parameters(), overlap=True)
    optimizer.zero_grad()
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.zero_grad()
    module[2](torch.ones(2, 8)).sum().backward()
    with Rest(endpoint(shared.url)) as rest:
        # The service has applied the gradient, so that there is something to settle.
        while not rest.run(optimizer.run_name)["ahead"]:
            pass
    optimizer.load_state_dict(saved)
    assert float(optimizer.state[module[2].weight]["step"]) == 1
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert float(optimizer.state[module[2].weight]["step"]) == 2


def test_a_service_without_room_for_a_loaded_state_says_so(
    shared: Service, start: Callable[..., Service], name: str
) -> None:
    service = start("--max-runs", "1")
    pair = made(shared, "adamw")
    first = pair.ours((module := model()).parameters())
    steps(module, first, 1)
    with AdamW(model().parameters(), url=service.url, run=name) as only:
        only.open()
        second = AdamW(model().parameters(), url=service.url)
        with pytest.raises(MuondError, match="OVER_CAPACITY"):
            second.load_state_dict(first.state_dict())
    assert second.step_count == 0


@pytest.mark.parametrize("begun", [False, True])
def test_a_checkpoint_of_an_optimizer_that_lives_is_branched_from(
    durable: Callable[..., Service], name: str, begun: bool
) -> None:
    pair = made(durable(), "adamw")
    module, other, theirs = model(), model(), model()
    one = pair.ours(module.parameters(), run=name, state="checkpoint", takeover=True)
    steps(module, one, 2)
    two = pair.ours(other.parameters(), takeover=True)
    if begun:
        steps(other, two, 1, 50)
    left = two.run_name if begun else None
    other.load_state_dict(module.state_dict())
    two.load_state_dict(one.state_dict())
    assert two.run_name not in (name, left)
    assert (two.step_count, two.run.digest) == (2, one.run.digest)
    steps(theirs, pair.theirs(theirs.parameters()), 4)
    for both in ((module, one), (other, two)):
        steps(*both, 2, 3)
        assert apart(both[0], theirs) < pair.tolerance
    assert one.run.digest == two.run.digest


def test_a_checkpoint_whose_run_another_process_has_is_branched_from(
    durable: Callable[..., Service], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = made(durable(), "adamw")
    module = model()
    one = pair.ours(module.parameters(), run=name, state="checkpoint")
    steps(module, one, 1)
    two = pair.ours(model().parameters())
    monkeypatch.setattr("muond.torch.living._owners", {})
    two.load_state_dict(one.state_dict())
    assert two.run_name != name
    assert two.run.digest == one.run.digest
    steps(module, one, 1, 2)


def test_a_run_without_a_name_that_was_left_keeps_what_a_dictionary_holds(
    durable: Callable[..., Service], name: str
) -> None:
    pair = made(durable(), "adamw")
    module = model()
    named = pair.ours(module.parameters(), run=name, state="checkpoint")
    steps(module, named, 1)
    theirs = named.state_dict()
    named.close()
    optimizer = pair.ours((again := model()).parameters(), state="checkpoint")
    steps(again, optimizer, 3)
    own = optimizer.state_dict()
    optimizer.load_state_dict(theirs)
    assert (optimizer.run_name, optimizer.step_count) == (name, 1)
    optimizer.load_state_dict(own)
    assert (optimizer.run_name, optimizer.step_count) == (own["muond"]["run"], 3)
    assert optimizer.run.digest == own["muond"]["digest"]


def test_an_older_dictionary_does_not_take_a_run_back(shared: Service) -> None:
    pair = made(shared, "adamw")
    module = model()
    first = pair.ours(module.parameters())
    steps(module, first, 2)
    older, weights = first.state_dict(), copy.deepcopy(module)
    steps(module, first, 1, 3)
    newest = first.state_dict()
    # The process that had it is gone, as far as the service knows.
    first.close()
    second = pair.ours(weights.parameters())
    second.load_state_dict(older)
    assert second.run_name != first.run_name
    steps(weights, second, 1, 3)
    assert apart(weights, module) == 0.0
    with Rest(endpoint(shared.url)) as rest:
        assert rest.run(first.run_name)["digest"] == newest["muond"]["digest"]
    third = pair.ours(model().parameters())
    third.load_state_dict(newest)
    assert third.run_name == first.run_name, "nobody has taken it further"


def test_entries_of_the_program_alone_are_no_state(shared: Service) -> None:
    module = model()
    optimizer = made(shared, "adamw").ours(module.parameters())
    saved = {"state": {0: {"mine": [1, 2]}}, "param_groups": optimizer.state_dict()["param_groups"]}
    optimizer.load_state_dict(saved)
    entries = optimizer.state[module[0].weight]
    assert entries["mine"] == [1, 2]
    assert entries["mine"] is not saved["state"][0]["mine"]
    steps(module, optimizer, 1)
    assert set(optimizer.state[module[0].weight]) == {"mine", "step", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_that_cannot_be_read_leaves_the_run_where_it_is(
    durable: Callable[..., Service], name: str, tmp_path: Path
) -> None:
    module, alone = model(), model()
    pair = made(durable(), "adamw")
    optimizer = pair.ours(module.parameters(), run=name, state="checkpoint")
    steps(module, optimizer, 1)
    saved = optimizer.state_dict()
    steps(module, optimizer, 1, 2)
    damage(tmp_path, name, saved["muond"]["checkpoint"])
    with pytest.raises(MuondError, match="CHECKPOINT_UNREADABLE"):
        optimizer.load_state_dict(saved)
    assert optimizer.step_count == 2
    steps(module, optimizer, 1, 3)
    other = pair.ours(alone.parameters())
    steps(alone, other, 3)
    assert apart(module, alone) == 0.0


def test_an_optimizer_without_a_name_goes_over_to_the_run_of_a_checkpoint(
    durable: Callable[..., Service], name: str
) -> None:
    pair = made(durable(), "adamw")
    module = model()
    first = pair.ours(module.parameters(), run=name, state="checkpoint")
    steps(module, first, 2)
    saved = first.state_dict()
    first.close()
    second = pair.ours((again := model()).parameters())
    steps(again, second, 1)
    left = second.run_name
    second.load_state_dict(saved)
    assert (second.run_name, second.step_count) == (name, 2)
    with Rest(second.run.address) as rest, pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        rest.run(left)
    third = pair.ours(model().parameters())
    steps(again, second, 1, 3)
    saved = second.state_dict()
    third.load_state_dict(saved)
    assert third.run_name != name, "a living optimizer has it"
