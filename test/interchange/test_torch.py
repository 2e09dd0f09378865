"""torch loads files that muond writes and goes on with the same updates; muond imports files that torch writes."""

import pathlib

import pytest
import torch
import torch.distributed.checkpoint as dcp

SPEC = {
    "groups": [
        {"name": "muon", "algorithm": "muon", "lr": 0.02},
        {"name": "ball", "algorithm": "muonclip", "lr": 0.003, "momentum": 0.9, "ns_coefficients": "keller_jordan"},
        {"name": "adamw", "algorithm": "adamw", "weight_decay": 0.1},
        {"name": "adam", "algorithm": "adam", "amsgrad": True},
        {"name": "slow", "algorithm": "adamw", "lr": 0.0001, "betas": [0.8, 0.95]},
        {"name": "rmsprop", "algorithm": "rmsprop", "momentum": 0.9},
        {"name": "sgd", "algorithm": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    ],
    "parameters": [
        {"name": "embedding", "shape": [30, 8], "group": "slow"},
        {"name": "h.0.up", "shape": [24, 16], "group": "muon"},
        {"name": "h.0.down", "shape": [16, 24], "group": "ball"},
        {"name": "h.1.up", "shape": [24, 16], "group": "muon"},
        {"name": "head", "shape": [30, 8], "group": "adamw"},
        {"name": "scalar", "shape": [], "group": "adam"},
        {"name": "norm", "shape": [9], "group": "rmsprop"},
        {"name": "bias", "shape": [17], "group": "sgd"},
        {"name": "gain", "shape": [8], "group": "adamw"},
    ],
}
SHAPES = {parameter["name"]: parameter["shape"] for parameter in SPEC["parameters"]}
STATE = ["momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg"]


def fresh(names: list[str]) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(7)
    return {name: torch.nn.Parameter(torch.randn(SHAPES[name])) for name in names}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_torch_goes_on_from_an_exported_state(service):
    service.steps("export", SPEC, 1, 3)
    out = pathlib.Path(service.path("optimizer.pt"))
    printed = service.muond("export", "export", "--to", "torch-optimizer", "--out", str(out))
    before = service.state("export")
    step = service.steps("export", SPEC, 4, 4)[4]
    after = service.state("export")

    for name in ["Muon", "AdamW", "Adam", "RMSprop", "SGD"]:
        path = out.with_suffix(f".{name}.pt")
        assert str(path) in printed
        saved = torch.load(path, weights_only=True)
        names = [group["param_names"] for group in saved["param_groups"]]
        parameters = fresh([each for group in names for each in group])
        groups = [{"params": [parameters[each] for each in group]} for group in names]
        optimizer = getattr(torch.optim, name)(groups)
        optimizer.load_state_dict(saved)
        for each, parameter in parameters.items():
            for kind, tensor in optimizer.state[parameter].items():
                expected = before[f"state.{each}.{kind}"]
                if kind == "step":
                    assert tensor == expected == 3
                elif each == "h.0.down":
                    assert torch.equal(tensor, (expected.double() * (1 - 0.9)).float())
                else:
                    assert torch.equal(tensor, expected), (each, kind)
            parameter.grad = step.gradient[each].clone()
        weights = {each: parameter.detach().clone() for each, parameter in parameters.items()}
        optimizer.step()
        for each, parameter in parameters.items():
            delta = parameter.detach().double() - (1 - step.decay[each]) * weights[each].double()
            ours = step.scale[each] * step.data[each].double()
            # torch.optim.Muon iterates in bfloat16, and its weights are float32.
            bound = 3e-2 if name == "Muon" else 1e-6 * float(weights[each].norm() / ours.norm()) + 1e-6
            assert relative(delta, ours) <= bound, (each, relative(delta, ours))
            for kind in STATE:
                if kind not in optimizer.state[parameter]:
                    continue
                mine = after[f"state.{each}.{kind}"] * ((1 - 0.9) if each == "h.0.down" else 1)
                assert relative(optimizer.state[parameter][kind], mine) <= 2e-7, (each, kind)


def test_adamw_moves_weights_of_zero_as_the_service_does(service):
    """Without weights in the way, the update itself is compared."""
    service.steps("zero", SPEC, 1, 2)
    out = pathlib.Path(service.path("optimizer.pt"))
    service.muond("export", "zero", "--to", "torch-optimizer", "--out", str(out))
    step = service.steps("zero", SPEC, 3, 3)[3]
    saved = torch.load(out.with_suffix(".AdamW.pt"), weights_only=True)
    names = [group["param_names"] for group in saved["param_groups"]]
    parameters = {each: torch.nn.Parameter(torch.zeros(SHAPES[each])) for group in names for each in group}
    optimizer = torch.optim.AdamW([{"params": [parameters[each] for each in group]} for group in names])
    optimizer.load_state_dict(saved)
    for each, parameter in parameters.items():
        parameter.grad = step.gradient[each].clone()
    optimizer.step()
    for each, parameter in parameters.items():
        assert relative(parameter.detach(), step.scale[each] * step.data[each].double()) <= 1e-6


def torch_trained(steps: int) -> list[torch.optim.Optimizer]:
    """What a training with torch's optimizers has after some steps: Muon for the matrices, AdamW for the rest."""
    parameters = fresh(list(SHAPES))
    muon = [(name, parameters[name]) for name in ["h.0.up", "h.0.down", "h.1.up"]]
    rest = [(name, parameter) for name, parameter in parameters.items() if not name.startswith("h.")]
    optimizers = [torch.optim.Muon(muon, momentum=0.9), torch.optim.AdamW(rest)]
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    return optimizers


TWO_GROUPS = {
    "groups": [
        {"name": "matrices", "algorithm": "muon", "momentum": 0.9},
        {"name": "rest", "algorithm": "adamw"},
    ],
    "parameters": [
        {"name": name, "shape": shape, "group": "matrices" if name.startswith("h.") else "rest"}
        for name, shape in SHAPES.items()
    ],
}


@pytest.mark.parametrize("form", ["ema", "heavy_ball"])
def test_a_state_dict_of_torch_is_imported(service, form):
    muon, adamw = torch_trained(3)
    run = f"torch-{form}"
    spec = {**TWO_GROUPS, "groups": [{**TWO_GROUPS["groups"][0], "momentum_form": form}, TWO_GROUPS["groups"][1]]}
    service.steps(run, spec, 1, 1)
    for optimizer, name in [(muon, "muon"), (adamw, "adamw")]:
        path = service.path(f"{name}.pt")
        torch.save(optimizer.state_dict(), path)
        printed = service.muond("import", run, path, "--from", "torch-optimizer", "--partial")
        assert f"run '{run}' goes on after step 1 with the state of" in printed
    state = service.state(run)
    for optimizer in [muon, adamw]:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                for kind, tensor in optimizer.state[parameter].items():
                    mine = state[f"state.{name}.{kind}"]
                    if kind == "momentum_buffer" and form == "heavy_ball":
                        assert torch.equal(mine, (tensor.double() / (1 - 0.9)).float())
                    else:
                        assert torch.equal(mine, tensor.to(mine.dtype)), (name, kind)

    step = service.steps(run, spec, 2, 2)[2]
    after = service.state(run)
    for optimizer in [muon, adamw]:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                parameter.grad = step.gradient[name].clone()
        optimizer.step()
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                for kind in STATE:
                    if kind in optimizer.state[parameter]:
                        scale = (1 - 0.9) if kind == "momentum_buffer" and form == "heavy_ball" else 1
                        mine = after[f"state.{name}.{kind}"] * scale
                        assert relative(mine, optimizer.state[parameter][kind]) <= 2e-7, (name, kind)


def test_parameters_without_names_are_paired_by_their_order(service):
    muon, _ = torch_trained(2)
    service.steps("order", TWO_GROUPS, 1, 1)
    path = service.path("muon.pt")
    saved = muon.state_dict()
    del saved["param_groups"][0]["param_names"]
    torch.save({"model": {"w": torch.zeros(2)}, "optimizer": saved}, path)
    arguments = ["import", "order", path, "--from", "torch-optimizer", "--partial", "--key", "optimizer"]
    with pytest.raises(Exception) as refused:
        service.muond(*arguments)
    assert "has no name there: give a map with --names, or --order" in refused.value.stderr
    service.muond(*arguments, "--order")
    state = service.state("order")
    for name, parameter in zip(["h.0.up", "h.0.down", "h.1.up"], muon.param_groups[0]["params"]):
        assert torch.equal(state[f"state.{name}.momentum_buffer"], muon.state[parameter]["momentum_buffer"])


def test_storages_that_do_not_lie_in_order_are_put_in_order(service):
    """Buffers of a transposed weight keep its strides, and views of one storage have offsets."""
    service.steps("strided", TWO_GROUPS, 1, 1)
    flat = torch.randn(2000)
    tensors = {"h.0.up": flat[100:484].view(16, 24).T, "h.0.down": flat[484:868].view(16, 24)}
    tensors["h.1.up"] = torch.randn(24, 32)[:, ::2].bfloat16()
    saved = {
        "state": {i: {"momentum_buffer": tensor} for i, tensor in enumerate(tensors.values())},
        "param_groups": [{"params": [0, 1, 2], "param_names": list(tensors)}],
    }
    path = service.path("strided.pt")
    torch.save(saved, path)
    service.muond("import", "strided", path, "--from", "torch-optimizer", "--partial")
    state = service.state("strided")
    for name, tensor in tensors.items():
        assert torch.equal(state[f"state.{name}.momentum_buffer"], tensor.float()), name


def test_torch_distributed_checkpoint_reads_the_folder(service):
    service.steps("dcp", SPEC, 1, 2)
    out = service.path("dcp")
    service.muond("export", "dcp", "--to", "torch-dcp", "--out", out)
    state = service.state("dcp")
    target = {name: torch.full(tensor.shape, torch.nan, dtype=torch.float32) for name, tensor in state.items()}
    groups = {f"param_groups.{name}.lr": None for name in SHAPES}
    wanted = {**target, **groups, "param_groups.head.betas": None, "param_groups.h.0.down.momentum_form": None}
    dcp.load(wanted, checkpoint_id=out)
    for name, tensor in state.items():
        factor = (1 - 0.9) if name == "state.h.0.down.momentum_buffer" else 1
        assert torch.equal(wanted[name], (tensor.double() * factor).float()), name
    assert wanted["param_groups.embedding.lr"] == 0.0001
    assert wanted["param_groups.head.betas"] == (0.9, 0.999)
    assert wanted["param_groups.h.0.down.momentum_form"] == "ema"


def test_an_optimizer_goes_on_from_the_folder_through_torch_s_own_state_dicts(service):
    """The names are those of torch.distributed.checkpoint.state_dict with flattened optimizer state."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    spec = {
        "groups": [{"name": "all", "algorithm": "adamw", "lr": 0.01}],
        "parameters": [
            {"name": "weight", "shape": [5, 4], "group": "all"},
            {"name": "bias", "shape": [5], "group": "all"},
        ],
    }
    service.steps("fsdp", spec, 1, 2)
    out = service.path("dcp")
    service.muond("export", "fsdp", "--to", "torch-dcp", "--out", out)
    state = service.state("fsdp")
    model = torch.nn.Linear(4, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.load(flat, checkpoint_id=out)
    set_optimizer_state_dict(model, optimizer, flat, options=options)
    assert optimizer.param_groups[0]["lr"] == 0.01
    for name, parameter in model.named_parameters():
        for kind in ["exp_avg", "exp_avg_sq", "step"]:
            expected = state[f"state.{name}.{kind}"]
            assert torch.equal(optimizer.state[parameter][kind], expected.to(torch.float32)), (name, kind)
