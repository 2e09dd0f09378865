"""What the tools around an optimizer put into it and ask of it."""

from __future__ import annotations

import gc
import threading
from collections import UserList
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from beside import EXACT, apart, backward, made, model, relative, steps
from torch import nn

import muond
from muond import MuondError
from muond.rest import Rest
from muond.torch import AdamW, Muon, Optimizer, suggest
from muond.transport.address import endpoint
from service import Service

# Keys of other tools in param_groups


def test_keys_of_other_tools_are_kept_and_ignored(shared: Service) -> None:
    pair = made(shared, "adamw")
    ends = []
    for make in pair.both:
        module = model()
        first, second = module.parameters()
        groups = [
            {
                "params": [first],
                "lr_scale": 0.5,
                "rho": 0.05,
                "weight_decay": 0.0,
                "group_name": "no_decay",
                7: "seven",
            },
            {"params": [second], "lr_scale": 1.0, "initial_lr": 0.3, "max_lr": 1.0, "name": "the rest"},
        ]
        optimizer = make(groups)
        for step in range(1, 5):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * group["lr_scale"]
            optimizer.param_groups[0]["name"] = f"named at step {step}"
            optimizer.param_groups[1]["swa_lr"] = 0.1
            steps(module, optimizer, 1, step)
        saved = optimizer.state_dict()["param_groups"]
        assert [group["lr_scale"] for group in saved] == [0.5, 1.0]
        assert (saved[0]["rho"], saved[0]["group_name"], saved[0][7], saved[1]["swa_lr"]) == (
            0.05,
            "no_decay",
            "seven",
            0.1,
        )
        again = make([{"params": [p]} for p in model().parameters()])
        again.load_state_dict(optimizer.state_dict())
        assert again.param_groups[0]["lr_scale"] == 0.5
        ends.append(module)
    assert apart(ends[1], ends[0]) < 1e-5


@pytest.mark.parametrize(
    ("key", "meant"), [("weigth_decay", "weight_decay"), ("nestrov", "nesterov"), ("momentun", "momentum")]
)
def test_only_what_is_nearly_a_name_is_warned_of(shared: Service, key: str, meant: str) -> None:
    with pytest.warns(UserWarning, match=f"has the key '{key}', which changes nothing: is it '{meant}'"):
        Muon([{"params": list(model().parameters()), key: 0.1}], url=shared.url)


def test_a_wrapper_that_shares_param_groups(shared: Service) -> None:
    class Sam(torch.optim.Optimizer):
        def __init__(self, params: Any, base: Callable[..., Any]) -> None:
            super().__init__(params, {"rho": 0.05, "lr": 0.02})
            self.base = base(self.param_groups)
            self.param_groups = self.base.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

    ends = []
    for make in made(shared, "adamw").both:
        module = model()
        steps(module, Sam(module.parameters(), make), 3)
        ends.append(module)
    assert apart(ends[1], ends[0]) < 1e-5


def test_groups_of_muon_with_aux_adam(shared: Service) -> None:
    """github.com/KellerJordan/Muon: `use_muon` shares the groups out."""
    module = model()
    first, second = module.parameters()
    groups = [{"params": [first], "use_muon": True, "lr": 0.05}, {"params": [second], "use_muon": False}]
    optimizer = Optimizer(groups, url=shared.url, **EXACT)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 3e-4]
    theirs = model()
    a, b = theirs.parameters()
    muon = torch.optim.Muon([a], lr=0.05, weight_decay=0.0)
    adam = torch.optim.AdamW([b], lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(1, 4):
        steps(module, optimizer, 1, step)
        theirs.zero_grad()
        backward(theirs, step)
        muon.step()
        adam.step()
    assert apart(module, theirs) < 2e-2
    assert relative(second, b) < 1e-3


def test_an_adamw_group_of_muon_has_adamws_values(shared: Service) -> None:
    first, second = model().parameters()
    groups = [{"params": [first]}, {"params": [second], "algorithm": "adamw", "lr": 0.01}]
    optimizer = Muon(groups, lr=0.05, url=shared.url)
    group = optimizer.param_groups[1]
    expected = torch.optim.AdamW([second]).param_groups[0]
    assert {key: group[key] for key in ("eps", "weight_decay", "betas")} == {
        key: expected[key] for key in ("eps", "weight_decay", "betas")
    }


# Values as configurations and schedulers write them


def test_numbers_of_numpy_torch_and_configurations(shared: Service) -> None:
    ends = []
    for make in made(shared, "adamw").both:
        module = model()
        optimizer = make(module.parameters())
        steps(module, optimizer, 1)
        group = optimizer.param_groups[0]
        group["lr"] = np.float32(0.03).item()
        if isinstance(optimizer, Optimizer):
            group["lr"] = np.float32(0.03)
            group["eps"] = np.array(1e-8)
            group["weight_decay"] = np.array([0.02])
            group["betas"] = UserList([np.float64(0.8), 0.99])
        else:
            group.update({"eps": 1e-8, "weight_decay": 0.02, "betas": (0.8, 0.99)})
        steps(module, optimizer, 3, 2)
        if isinstance(optimizer, Optimizer):
            group["betas"] = np.array([0.8, 0.99], np.float32)
            group["lr"] = torch.tensor(0.01, dtype=torch.float64)
        else:
            group["betas"] = tuple(np.array([0.8, 0.99], np.float32).tolist())
            group["lr"] = 0.01
        steps(module, optimizer, 1, 5)
        ends.append(module)
    assert apart(ends[1], ends[0]) < 1e-5


def test_one_cycle_finds_what_it_cycles(shared: Service) -> None:
    module = model()
    group = {"params": list(module.parameters()), "algorithm": "sgd", "lr": 0.1, "momentum": 0.9}
    optimizer = Optimizer([group], url=shared.url)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    steps(module, optimizer, 1)
    schedule.step()
    assert optimizer.receipt is not None
    assert optimizer.receipt.groups["sgd"]["momentum"] == 0.95
    first, second = model().parameters()
    mixed = Optimizer(
        [{"params": [first], "algorithm": "muon"}, {"params": [second], "algorithm": "adamw"}], url=shared.url
    )
    assert mixed.defaults.keys() >= {"lr", "weight_decay"}
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        torch.optim.lr_scheduler.OneCycleLR(mixed, max_lr=0.2, total_steps=10)
    torch.optim.lr_scheduler.OneCycleLR(mixed, max_lr=[0.2, 0.1], total_steps=10, cycle_momentum=False)


def test_averages_of_weights_beside_it(shared: Service) -> None:
    ends = []
    for make in made(shared, "adamw").both:
        module = model()
        optimizer = make(module.parameters())
        averaged = torch.optim.swa_utils.AveragedModel(
            module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for step in range(1, 5):
            steps(module, optimizer, 1, step)
            averaged.update_parameters(module)
            schedule.step()
        ends.append(averaged.module)
    assert apart(ends[1], ends[0]) < 1e-5


# Where it runs


def test_another_default_device_changes_nothing(shared: Service) -> None:
    """As ``cuda`` does it, the meta device takes every tensor that says no device."""
    pair = made(shared, "adamw")
    for gradient_dtype in ("float32", "bfloat16"):
        ours, alone = model(), model()
        optimizer, other = (pair.ours(m.parameters(), gradient_dtype=gradient_dtype) for m in (ours, alone))
        torch.set_default_device("meta")
        try:
            for step in range(1, 4):
                optimizer.zero_grad()
                with torch.device("cpu"):
                    backward(ours, step)
                optimizer.step()
            assert all(value.device.type == "cpu" for entries in optimizer.state.values() for value in entries.values())
            optimizer.state[ours[0].weight]["step"] = 3
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            torch.set_default_device(None)
        steps(alone, other, 3)
        assert apart(ours, alone) == 0.0


def test_the_submodule_is_there_when_it_is_asked_for() -> None:
    assert isinstance(muond.torch, ModuleType)
    assert muond.torch.suggest is suggest
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        muond.nothing  # noqa: B018 - it raises


def test_names_of_two_models_may_be_alike(shared: Service) -> None:
    pair = made(shared, "adamw")
    ends = []
    for make in pair.both:
        one, two = model(), model(seed=1)
        optimizer = make([*one.named_parameters(), *two.named_parameters()])
        for module in (one, two):
            steps(module, optimizer, 2)
        second = make([*one.named_parameters(), *two.named_parameters()])
        second.load_state_dict(optimizer.state_dict())
        steps(two, second, 1, 3)
        ends.append((one, two, second))
    assert all(apart(a, b) < 1e-5 for a, b in zip(ends[1][:2], ends[0][:2], strict=True))
    names = [p.name for p in ends[1][2].run.parameters]
    assert names == ["0.weight", "2.weight", "0.weight.2", "2.weight.2"]


def test_a_model_is_its_named_parameters(shared: Service) -> None:
    """Trainer's ``optimizer_cls_and_kwargs`` gives the class what its kwargs call ``model`` or ``params``."""
    module = model()
    optimizer = Optimizer(module, suggest(module, quiet=True), url=shared.url)
    steps(module, optimizer, 1)
    assert [p.name for p in optimizer.run.parameters] == ["0.weight", "2.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_step_is_the_step(shared: Service) -> None:
    ends = []
    for compiled in (False, True):
        module = model()
        optimizer = made(shared, "adamw").ours(module.parameters())

        def train(module: nn.Module = module, optimizer: Any = optimizer) -> None:
            module(torch.ones(2, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step: Any = torch.compile(train, backend="eager") if compiled else train
        for _ in range(3):
            step()
        assert optimizer.step_count == 3
        ends.append(module)
    assert apart(ends[1], ends[0]) == 0.0


def test_threads_take_their_steps_one_after_the_other(shared: Service) -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = Optimizer([{"params": [weight], "algorithm": "sgd", "lr": 1.0}], url=shared.url, **EXACT)
    weight.grad = torch.ones(64, 64)
    failures: list[BaseException] = []

    def take() -> None:
        try:
            for _ in range(10):
                optimizer.step()
        except BaseException as failure:  # noqa: BLE001 - told below
            failures.append(failure)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert optimizer.step_count == 40
    assert torch.equal(weight.detach(), torch.full((64, 64), -39.0))


# Sweeps


def test_a_sweep_leaves_no_runs(start: Callable[..., Service]) -> None:
    service = start("--max-runs", "3")

    def trial(**options: Any) -> str:
        module = model()
        optimizer = AdamW(module.parameters(), lr=0.01, url=service.url, **options)
        steps(module, optimizer, 1)
        return optimizer.run_name

    for _ in range(8):
        trial()
        gc.collect()
    kept = [trial(run=f"kept-{i}") for i in range(3)]
    gc.collect()
    with Rest(endpoint(service.url)) as rest:
        assert [rest.run(name)["step"] for name in kept] == [1, 1, 1]
    words = r"at most 3: .*DELETE /v1/runs/.*--max-runs \(close\(delete=True\)"
    with pytest.raises(MuondError, match=words) as caught:
        trial()
    assert caught.value.code == "OVER_CAPACITY"


def test_an_optimizer_that_only_a_cycle_holds_makes_room(start: Callable[..., Service]) -> None:
    service = start("--max-runs", "1")
    gc.disable()
    try:
        for _ in range(3):
            module = model()
            optimizer = AdamW(module.parameters(), url=service.url)
            steps(module, optimizer, 1)
            # As the error of a trial that failed holds its frame.
            cycle: list[Any] = [optimizer]
            cycle.append(cycle)
            del optimizer, cycle
    finally:
        gc.enable()


def test_a_run_that_a_folder_keeps_stays(durable: Callable[..., Service]) -> None:
    service = durable()
    module = model()
    optimizer = AdamW(module.parameters(), url=service.url)
    steps(module, optimizer, 1)
    name = optimizer.run_name
    del optimizer
    gc.collect()
    with Rest(endpoint(service.url)) as rest:
        assert rest.run(name)["step"] == 1
    gone = AdamW(module.parameters(), url=service.url)
    steps(module, gone, 1)
    gone.close(delete=True)
    with Rest(endpoint(service.url)) as rest, pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        rest.run(gone.run_name)


def test_a_checkpoint_that_another_service_does_not_know_says_what_to_do(
    durable: Callable[..., Service], shared: Service
) -> None:
    module = model()
    optimizer = AdamW(module.parameters(), url=durable().url, state="checkpoint")
    steps(module, optimizer, 1)
    saved = optimizer.state_dict()
    other = AdamW(model().parameters(), url=shared.url)
    with pytest.raises(MuondError, match=r"connect to the one that has .* or load a state_dict with state='tensors'"):
        other.load_state_dict(saved)
