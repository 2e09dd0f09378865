"""The cases of PyTorch's own optimizer tests (torch.testing._internal.common_optimizers), held against torch's optimizers."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from beside import EXACT, relative
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from muond import MuondError
from muond.torch import AdamW, Muon, Optimizer
from service import Service

NAMES = ("Muon", "AdamW", "SGD", "Adam", "RMSprop")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in NAMES}
TOLERANCE = {"Muon": 3e-2}
INPUTS = [
    pytest.param(name, case.kwargs, id=f"{name}-{case.desc}")
    for name in NAMES
    for case in INFOS[name].optim_inputs_func(device="cpu")
]
ERRORS = [
    pytest.param(name, case, id=f"{name}-{case.optimizer_error_input.desc}")
    for name in NAMES
    for case in INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)
    # An Optimizer of groups lists its parameters before torch sees a set.
    if name in ("Muon", "AdamW") or not isinstance(case.optimizer_error_input.params, set)
]
SCHEDULES = [
    pytest.param(name, schedules, id=f"{name}-{number}")
    for name in NAMES
    for number, schedules in enumerate(INFOS[name].scheduler_inputs)
]


def ours(service: Service, name: str, params: Any, **kwargs: Any) -> Optimizer:
    options: Any = {"url": service.url, **EXACT}
    if name == "Muon":
        return Muon(params, **kwargs, **options)
    if name == "AdamW":
        return AdamW(params, **kwargs, **options)
    if isinstance(params, torch.Tensor):
        return Optimizer(params, **options)
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    return Optimizer([{"algorithm": name.lower(), **kwargs, **group} for group in groups], **options)


class Decoupled:
    """torch's SGD with the weight decay of the service's, which is AdamW's: W <- (1 - lr · decay) · W before the step."""

    def __init__(self, optimizer: Any, decay: float) -> None:
        self.optimizer = optimizer
        self.decay = decay

    @torch.no_grad()
    def step(self) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.mul_(1 - float(group["lr"]) * self.decay)
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def theirs(name: str, params: Any, **kwargs: Any) -> Any:
    decay = kwargs.pop("weight_decay", 0.0) if name == "SGD" else 0.0
    made = getattr(torch.optim, name)(params, **kwargs)
    return Decoupled(made, decay) if decay else made


def both(service: Service, name: str, **kwargs: Any) -> Iterator[tuple[nn.Linear, Any]]:
    for make in (theirs, lambda name, params, **kwargs: ours(service, name, params, **kwargs)):
        torch.manual_seed(0)
        module = nn.Linear(10, 6, bias=False)
        yield module, make(name, module.parameters(), **copy.deepcopy(kwargs))


def loss(module: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (module(torch.randn(12, 10, generator=generator)) - 1).square().mean()


def train(module: nn.Module, optimizer: Any, count: int, first: int = 1) -> None:
    for step in range(first, first + count):
        optimizer.zero_grad()
        loss(module, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def close(name: str, modules: list[nn.Linear]) -> bool:
    return relative(modules[1].weight, modules[0].weight) < TOLERANCE.get(name, 1e-5)


@pytest.mark.parametrize(("name", "kwargs"), INPUTS)
def test_every_way_to_make_one_takes_torchs_steps(shared: Service, name: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("centered"):
        with pytest.raises(ValueError, match="centered=True is not possible"):
            list(both(shared, name, **kwargs))
        return
    modules = []
    for module, optimizer in both(shared, name, **kwargs):
        train(module, optimizer, 6)
        modules.append(module)
    assert close(name, modules)


@pytest.mark.parametrize(("name", "case"), ERRORS)
def test_what_torch_refuses_is_refused_in_its_words(shared: Service, name: str, case: Any) -> None:
    given = case.optimizer_error_input
    params = [nn.Parameter(torch.ones(2, 2))] if given.params is None else given.params
    if case.error_type in (UserWarning, FutureWarning):
        with pytest.warns(case.error_type, match=case.error_regex):
            ours(shared, name, params, **given.kwargs)
        return
    # What torch finds out with the first step is found out here when the optimizer is made.
    late = case.error_on is OptimizerErrorEnum.STEP_ERROR
    kind, words = (ValueError, "complex parameters") if late else (case.error_type, case.error_regex)
    with pytest.raises(kind, match=words):
        ours(shared, name, params, **given.kwargs)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "copy"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_by_themselves(shared: Service, name: str, how: str) -> None:
    modules = []
    for module, optimizer in both(shared, name):
        train(module, optimizer, 3)
        pair = {"module": module, "optimizer": optimizer}
        if how == "deepcopy":
            pair = copy.deepcopy(pair)
        elif how == "pickle":
            pair = pickle.loads(pickle.dumps(pair))
        elif how == "save":
            file = io.BytesIO()
            torch.save(pair, file)
            pair = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        else:
            pair = {"module": module, "optimizer": copy.copy(optimizer)}
        if how != "copy":
            assert pair["module"] is not module
            train(module, optimizer, 1, 50)
        if isinstance(optimizer, Optimizer):
            assert pair["optimizer"].run_name != optimizer.run_name
        train(pair["module"], pair["optimizer"], 3, 4)
        modules.append(pair["module"])
    assert close(name, modules)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_before_the_first_step_has_no_state(shared: Service, name: str) -> None:
    modules = []
    for module, optimizer in both(shared, name):
        module, optimizer = copy.deepcopy((module, optimizer))
        assert len(optimizer.state) == 0
        train(module, optimizer, 3)
        modules.append(module)
    assert close(name, modules)


@pytest.mark.parametrize(("name", "schedules"), SCHEDULES)
def test_schedules_one_behind_the_other(shared: Service, name: str, schedules: Any) -> None:
    modules = []
    for module, optimizer in both(shared, name, lr=0.02):
        inner = optimizer.optimizer if isinstance(optimizer, Decoupled) else optimizer
        made = [schedule(inner) for schedule in schedules]
        for step in range(1, 9):
            train(module, optimizer, 1, step)
            for schedule in made:
                if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    schedule.step(loss(module, step).item())
                else:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        schedule.step()
        modules.append(module)
    assert close(name, modules)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_goes_on_as_the_optimizer_does(shared: Service, name: str) -> None:
    """test_state_dict_deterministic: loaded in a new optimizer, also of a model in which nothing else is the same."""
    modules = []
    for module, optimizer in both(shared, name, lr=0.02):
        train(module, optimizer, 3)
        again = copy.deepcopy(module)
        second = (
            ours(shared, name, again.parameters(), lr=0.5)
            if isinstance(optimizer, Optimizer)
            else theirs(name, again.parameters(), lr=0.5)
        )
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert second.param_groups[0]["lr"] == 0.02
        for it, each in ((module, optimizer), (again, second)):
            train(it, each, 3, 4)
        assert torch.equal(module.weight, again.weight)
        modules.append(again)
    assert close(name, modules)


@pytest.mark.parametrize("ours_named", [True, False])
@pytest.mark.parametrize("saved_named", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_named_and_unnamed_state_dicts(shared: Service, name: str, saved_named: bool, ours_named: bool) -> None:
    """test_can_load_from_to_named_state_dict."""
    modules = []
    for module, optimizer in both(shared, name):
        make = ours if isinstance(optimizer, Optimizer) else None
        list_ = list(module.named_parameters() if saved_named else module.parameters())
        first = make(shared, name, list_) if make else theirs(name, list_)
        train(module, first, 3)
        saved = first.state_dict()
        assert ("param_names" in saved["param_groups"][0]) == saved_named
        again = copy.deepcopy(module)
        list_ = list(again.named_parameters() if ours_named else again.parameters())
        second = make(shared, name, list_) if make else theirs(name, list_)
        second.load_state_dict(saved)
        train(again, second, 3, 4)
        modules.append(again)
    assert close(name, modules)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_steps_and_of_all_optimizers(shared: Service, name: str) -> None:
    for module, optimizer in both(shared, name):
        seen: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, seen=seen: seen.append("global pre")),
            optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("pre")),
            optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("post")),
            register_optimizer_step_post_hook(lambda *_, seen=seen: seen.append("global post")),
        ]
        train(module, optimizer, 1)
        for handle in handles:
            handle.remove()
        train(module, optimizer, 1, 2)
        assert seen == ["global pre", "pre", "post", "global post"]


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_and_gradients_of_zero_or_none(shared: Service, name: str) -> None:
    modules = []
    for module, optimizer in both(shared, name):

        def closure(module: nn.Module = module, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(module, 1)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        assert math.isfinite(optimizer.step(closure).item())
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        before = module.weight.detach().clone()
        optimizer.step()
        assert torch.equal(module.weight, before)
        modules.append(module)
    assert close(name, modules)


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_elements_is_taken_and_left_alone(shared: Service, name: str) -> None:
    """test_empty_grad."""
    ends = []
    for module, optimizer in both(shared, name):
        nothing = nn.Parameter(torch.zeros(0, 3))
        both_ = [nothing, module.weight]
        made = ours(shared, name, both_) if isinstance(optimizer, Optimizer) else theirs(name, both_)
        for step in range(1, 4):
            made.zero_grad()
            (loss(module, step) + nothing.sum()).backward()
            made.step()
        assert nothing.shape == (0, 3)
        if isinstance(made, Optimizer):
            assert list(made.state_dict()["state"]) == [1], "torch counts steps of nothing as well"
        ends.append(module)
    assert close(name, ends)


def test_what_cannot_be_pickled_or_computed_is_refused_when_it_is_made(shared: Service) -> None:
    weight = [nn.Parameter(torch.ones(2, 2))]
    for key in ("capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{key}=True is not possible"):
            ours(shared, "AdamW", weight, **{key: True})
        with pytest.raises(ValueError, match=f"{key}=True is not possible"):
            ours(shared, "AdamW", [{"params": weight, key: True}])
    with pytest.raises(ValueError, match="on the meta device: it has no values yet"):
        ours(shared, "AdamW", [nn.Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(ValueError, match=r"eps is 0\.01, expected 0 to 1e-06"):
        ours(shared, "Muon", weight, eps=0.01)
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        ours(shared, "SGD", weight, nesterov=True)
    for values in ({"lr": float("nan")}, {"lr": -1.0}):
        with pytest.raises(ValueError, match="Invalid learning rate"):
            ours(shared, "SGD", weight, **values)
    with pytest.raises(ValueError, match=r"a hyperparameter is a tensor of shape \[2\], expected one element"):
        ours(shared, "SGD", weight, momentum=torch.ones(2))
    with pytest.raises(TypeError, match="lr is None"):
        ours(shared, "AdamW", weight, lr=None)
    with pytest.raises(TypeError, match="momentum is None"):
        ours(shared, "SGD", weight, momentum=None)
    for params in (None, [None], [{"params": None}], [{"params": [None]}]):
        with pytest.raises(TypeError):
            ours(shared, "AdamW", params)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        ours(shared, "AdamW", weight).add_param_group(weight)  # type: ignore[arg-type]


def test_a_value_is_checked_when_it_changes(shared: Service) -> None:
    for module, optimizer in both(shared, "AdamW"):
        if not isinstance(optimizer, Optimizer):
            continue
        train(module, optimizer, 1)
        group = optimizer.param_groups[0]
        for key, value, kind, words in (
            ("lr", None, TypeError, "lr is None"),
            ("lr", -0.5, ValueError, "Invalid learning rate: -0.5"),
            ("betas", (1.0, 0.9), ValueError, "Invalid beta parameter at index 0: 1.0"),
        ):
            before = group[key]
            group[key] = value
            with pytest.raises(kind, match=words):
                train(module, optimizer, 1)
            group[key] = before
        train(module, optimizer, 1)
        assert optimizer.step_count == 2


def test_a_parameter_that_a_group_has_twice_is_warned_of_and_moved_once(shared: Service) -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = ours(shared, "SGD", [weight, weight], lr=0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [0.5, 0.5]
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 0]
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_copy_of_a_clipping_optimizer_keeps_what_it_measures_with(shared: Service) -> None:
    from muond.torch import MaxLogits, MuonClip

    measured = MaxLogits()
    optimizer = MuonClip([("w", nn.Parameter(torch.ones(4, 4)))], url=shared.url, max_logits=measured, callback=print)
    copied = copy.deepcopy(optimizer)
    assert copied._settings.max_logits is measured
    assert copied._settings.callback is print
    with pytest.raises(TypeError, match="max_logits measures the modules of this process"):
        pickle.dumps(optimizer)


def test_a_pickle_has_no_key_in_it(shared: Service) -> None:
    optimizer = AdamW(
        [nn.Parameter(torch.ones(2))], url=shared.url, token="a secret", headers={"X-Other": "another secret"}
    )
    text = pickle.dumps(optimizer)
    assert b"secret" not in text
    assert pickle.loads(text).param_groups[0]["lr"] == 1e-3
    assert copy.deepcopy(optimizer)._settings.token == "a secret"


def test_an_unpickled_optimizer_without_its_service_says_so(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pickle.dumps(AdamW([nn.Parameter(torch.ones(2))], url=shared.url))
    monkeypatch.setattr("muond.torch.optimizer.Connection", lambda *_: (_ for _ in ()).throw(MuondError("X", "gone")))
    with pytest.raises(MuondError, match="gone"):
        pickle.loads(text)
