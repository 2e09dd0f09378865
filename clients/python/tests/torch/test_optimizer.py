"""What a torch optimizer does: schedules, closures, clipping, accumulation, scaling, dtypes, layouts, and errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import distance, examples, loss_of, matrices, net, train
from torch import nn

import muond
from muond import MuondError
from muond.torch import AdamW, Muon, MuonClip, Optimizer
from oracle import Muon as Oracle
from service import Service, keys_file

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}


def adamw(model: nn.Module, service: Service, name: str, lr: float = 1e-2, **options: Any) -> AdamW:
    return AdamW(model.parameters(), lr=lr, url=service.url, run=name, **{**EXACT, **options})


def follow(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-5) -> None:
    assert distance(ours, theirs) < tolerance


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.03, total_steps=20),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=50),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    ids=["step", "cosine", "one-cycle", "linear", "plateau"],
)
def test_learning_rate_schedules_change_nothing_against_the_local_optimizer(
    shared: Service, name: str, make: Callable[[torch.optim.Optimizer], Any]
) -> None:
    ours, theirs = net(), net()
    with adamw(ours, shared, name) as remote:
        local = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
        for model, optimizer in ((ours, remote), (theirs, local)):
            schedule = make(optimizer)
            for step in range(1, 16):
                loss = train(model, optimizer, 1, step)[0]
                schedule.step(*([loss] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        assert remote.receipt is not None
        assert remote.receipt.groups["adamw"]["lr"] != 1e-2
    follow(ours, theirs)


def test_a_changed_rate_travels_with_the_next_step_and_only_what_changed(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name, lr=torch.tensor(0.01)) as optimizer:
        run = optimizer.open()
        begun: list[Any] = []
        begin = run.begin
        run.begin = lambda **options: (begun.append(options["groups"]), begin(**options))[1]  # type: ignore[method-assign]
        train(model, optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.param_groups[0]["betas"] = (0.5, 0.75)
        train(model, optimizer, 2)
        assert optimizer.receipt is not None
        assert optimizer.receipt.groups["adamw"]["lr"] == 0.5
    assert begun == [None, None, {"adamw": {"lr": 0.5, "betas": [0.5, 0.75]}}, None]


def test_what_is_part_of_the_state_cannot_change(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:
        train(model, optimizer, 1)
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises(ValueError, match="amsgrad of a group was False and is True: a run cannot change it"):
            train(model, optimizer, 1)
        optimizer.param_groups[0]["amsgrad"] = False
        train(model, optimizer, 1)


def test_a_closure_gives_its_loss_and_without_one_there_is_the_receipt(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 1)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        loss = optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)
        assert loss.requires_grad
        assert optimizer.receipt is not None
        assert optimizer.receipt.step == 1
        loss_of(model, 2).backward()  # type: ignore[no-untyped-call]
        receipt = optimizer.step()
        assert receipt == optimizer.receipt
        assert (receipt.step, optimizer.step_count) == (2, 2)
        assert optimizer.run.digest == receipt.digest


def test_clipping_and_accumulation_change_nothing_against_the_local_optimizer(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    with adamw(ours, shared, name) as remote:
        for model, optimizer in ((ours, remote), (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2))):
            for step in range(1, 21):
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                for part in range(4):
                    (loss_of(model, 10 * step + part) / 4).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
    follow(ours, theirs)


def test_a_parameter_without_a_gradient_is_left_alone(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    with adamw(ours, shared, name) as remote:
        for model, optimizer in ((ours, remote), (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2))):
            weight = model[0].weight
            weight.requires_grad_(False)
            train(model, optimizer, 3)
            weight.requires_grad_(True)
            train(model, optimizer, 3, 4)
            for parameter in model[2].parameters():
                parameter.requires_grad_(False)
            train(model, optimizer, 3, 7)
        assert remote.receipt is not None
        assert (remote.receipt.applied, remote.receipt.skipped) == (2, 2)
        assert remote.run_name == f"{name}.2", "a thawed parameter is declared in another run"
    follow(ours, theirs)


def test_grad_scaler_skips_the_step_of_an_overflow(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    with adamw(ours, shared, name) as remote:
        for model, optimizer in ((ours, remote), (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2))):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
            for step in range(1, 11):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                scaler.scale(loss * (float("inf") if step == 4 else 1.0)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
        assert remote.step_count == 9
    follow(ours, theirs)


def test_maximize_is_a_step_the_other_way(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    with adamw(ours, shared, name, maximize=True, fused=True, foreach=True) as remote:
        train(ours, remote, 5)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, maximize=True), 5)
    follow(ours, theirs)


def test_maximize_is_each_groups_own(shared: Service, name: str) -> None:
    ours, theirs = net(), net()

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p], "maximize": i % 2 == 0} for i, p in enumerate(model.parameters())]

    with AdamW(groups(ours), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        train(ours, optimizer, 5)
    train(theirs, torch.optim.AdamW(groups(theirs), lr=1e-2), 5)
    follow(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parameters_of_every_dtype(shared: Service, name: str, dtype: torch.dtype) -> None:
    # torch keeps float16 state for float16 weights, in which eps vanishes; the service's state is float32 for all.
    ours, theirs = net(dtype), net(dtype).double()
    with AdamW(ours.parameters(), lr=1e-2, url=shared.url, run=name) as remote:
        train(ours, remote, 8)
        sent = {p.gradient_dtype for p in remote.run.parameters}
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), 8)
    assert sent == {{torch.float64: "float32", torch.float16: "float16"}.get(dtype, "bfloat16")}
    assert all(p.dtype == dtype for p in ours.parameters())
    follow(ours, theirs, {torch.float64: 1e-5, torch.float16: 3e-2, torch.bfloat16: 4e-2}[dtype])


def test_groups_have_dtypes_of_their_own(shared: Service, name: str) -> None:
    first, second = net().parameters(), net().parameters()
    groups = [
        {"params": list(first), "gradient_dtype": "float32", "update_dtype": torch.bfloat16},
        {"params": list(second), "name": "second"},
    ]
    with AdamW(groups, url=shared.url, run=name, gradient_dtype=torch.float16) as optimizer:
        optimizer.open()
        declared = [slot.declaration for slot in optimizer._home.slots]
    found = [(p.group, p.gradient_dtype, p.update_dtype) for p in declared]
    assert found == [("adamw", "float32", "bfloat16")] * 4 + [("second", "float16", "bfloat16")] * 4


def test_parameters_may_be_moved_and_cast_before_the_first_step(shared: Service, name: str) -> None:
    ours, theirs = net(), net(torch.float64)
    with AdamW(ours.parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as remote:
        ours.to(torch.float64)
        train(ours, remote, 5)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), 5)
    follow(ours, theirs)


def test_memory_formats_and_views_do_not_matter(shared: Service, name: str) -> None:
    torch.manual_seed(1)
    values, gradient = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    plain, channels_last = values.clone(), values.clone().to(memory_format=torch.channels_last)
    strided = torch.zeros(8, 6, 3, 6)[..., ::2]
    strided.copy_(values)
    tensors = [tensor.requires_grad_() for tensor in (plain, channels_last, strided)]
    tensors[0].grad = gradient.clone()
    tensors[1].grad = gradient.clone().to(memory_format=torch.channels_last)
    tensors[2].grad = gradient.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with Muon(
        [(f"conv{i}", t) for i, t in enumerate(tensors)],
        lr=0.1,
        url=shared.url,
        run=name,
        layouts={"conv*": {"matrices": "flatten"}},
        **EXACT,
    ) as optimizer:
        optimizer.step()
    assert not torch.equal(plain, values)
    assert torch.equal(plain, channels_last)
    assert torch.equal(plain, strided)


def orthogonal(matrix: torch.Tensor, lr: float) -> torch.Tensor:
    oracle = Oracle(torch.zeros(matrix.shape).double().numpy(), lr=lr)
    oracle.step(matrix.numpy())
    return torch.from_numpy(oracle.weights)


def test_fused_matrices_convolutions_and_experts_are_the_matrices_they_consist_of(shared: Service, name: str) -> None:
    torch.manual_seed(2)
    shapes = {"qkv": (24, 8), "heads": (24, 8), "conv": (8, 3, 3, 3), "experts": (4, 6, 10)}
    weights = {key: torch.zeros(shape, requires_grad=True) for key, shape in shapes.items()}
    gradients = {key: torch.randn(shape) for key, shape in shapes.items()}
    for key, weight in weights.items():
        weight.grad = gradients[key].clone()
    groups = [
        {"params": [("qkv", weights["qkv"])], "split": [8, 8, 8]},
        {"params": [(key, weights[key]) for key in ("heads", "conv", "experts")]},
    ]
    layouts = {"heads": {"heads": 6}, "con?": {"matrices": "flatten"}, "experts": {"matrices": "batch"}}
    with Muon(groups, lr=0.5, url=shared.url, run=name, layouts=layouts, **EXACT) as optimizer:
        optimizer.step()
    expected = {
        "qkv": torch.cat([orthogonal(part, 0.5) for part in gradients["qkv"].split(8)]),
        "heads": torch.cat([orthogonal(part, 0.5) for part in gradients["heads"].split(4)]),
        "conv": orthogonal(gradients["conv"].flatten(1), 0.5).view(8, 3, 3, 3),
        "experts": torch.stack([orthogonal(part, 0.5) for part in gradients["experts"]]),
    }
    for key, weight in weights.items():
        error = float((weight.detach().double() - expected[key]).norm() / expected[key].norm())
        assert error < 1e-5, key


def test_tied_weights_are_one_parameter(shared: Service, name: str) -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.Linear(12, 6))
        model[2].weight = model[0].weight
        return model

    ours, theirs = tied(), tied()
    with adamw(ours, shared, name) as remote:
        train(ours, remote, 5)
        assert len(remote.run.parameters) == 3
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), 5)
    follow(ours, theirs)


def test_scalars_and_vectors_have_adamw(shared: Service, name: str) -> None:
    ours, theirs = [torch.tensor(1.5), torch.ones(3)], [torch.tensor(1.5), torch.ones(3)]
    for tensor in (*ours, *theirs):
        tensor.requires_grad_()
        tensor.grad = torch.full(tensor.shape, 0.25)
    torch.optim.AdamW(theirs, lr=0.1).step()
    with AdamW(ours, lr=0.1, url=shared.url, run=name, **EXACT) as optimizer:
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_variants_of_muon_are_asked_for_by_name(shared: Service, name: str) -> None:
    model = net()
    with Muon(
        matrices(model),
        lr=0.01,
        ns_coefficients="polar_express",
        ns_steps=None,
        adjust_lr_fn="spectral_unclamped",
        momentum_dtype="bfloat16",
        second_momentum="normuon",
        url=shared.url,
        run=name,
    ) as optimizer:
        train(model, optimizer, 3)
        assert optimizer.receipt is not None
        group = optimizer.receipt.groups["muon"]
        state = optimizer.state_dict()["state"][0]
    wanted = {"ns_coefficients": "polar_express", "adjust_lr_fn": "spectral", "second_momentum": "normuon"}
    assert {key: group[key] for key in wanted} == wanted
    assert state["momentum_buffer"].dtype == torch.bfloat16
    assert state["second_momentum"].shape == (24, 1)


@pytest.mark.parametrize("algorithm", ["sgd", "rmsprop", "adam"])
def test_any_algorithm_of_the_service_can_have_a_group(shared: Service, name: str, algorithm: str) -> None:
    theirs_of = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}[algorithm]
    ours, theirs = net(), net()
    groups = [{"parameters": "*", "algorithm": algorithm, "lr": 1e-3, "name": "all"}]
    with Optimizer(ours.named_parameters(), groups, url=shared.url, run=name, **EXACT) as optimizer:
        train(ours, optimizer, 6)
    train(theirs, theirs_of(theirs.parameters(), lr=1e-3), 6)
    follow(ours, theirs)


def test_qk_clip_takes_attentions_by_parameter_or_name(shared: Service, name: str) -> None:
    query, key = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    before = query.detach().clone(), key.detach().clone()
    query.grad, key.grad = torch.zeros(8, 6), None
    attentions = [{"name": "a", "query_heads": 2, "head_dim": 2, "threshold": 4, "query": query, "key": ("key", 4)}]

    class Logits(muond.MaxLogits):
        def reading(self) -> Callable[[], dict[str, list[float]]]:
            return lambda: {"a": [16.0, 1.0]}

    with MuonClip(
        [("query", query), ("key", key)],
        lr=0.0,
        url=shared.url,
        run=name,
        attentions=attentions,
        max_logits=Logits(),
        **EXACT,
    ) as optimizer:
        receipt = optimizer.step()
    assert receipt.clipped_heads == {"a": 1}
    torch.testing.assert_close(query.detach()[:2], before[0][:2] / 2)
    torch.testing.assert_close(key.detach()[4:6], before[1][4:6] / 2)
    assert torch.equal(query.detach()[2:], before[0][2:])
    assert torch.equal(key.detach()[:4], before[1][:4])


def test_rows_of_experts_side_by_side_can_be_clipped(shared: Service, name: str) -> None:
    weight = torch.ones(2, 3, 4, requires_grad=True)
    attentions = [
        {
            "name": "a",
            "query_heads": 1,
            "head_dim": 3,
            "query": "w",
            "key": {"parameter": "w", "first_row": 3},
            "threshold": 1,
        }
    ]

    class Logits(muond.MaxLogits):
        def reading(self) -> Callable[[], dict[str, list[float]]]:
            return lambda: {"a": [4.0]}

    groups = [{"parameters": ["w"], "algorithm": "sgd", "name": "g"}]
    with (
        Optimizer(
            [("w", weight)], groups, url=shared.url, run=name, attentions=attentions, max_logits=Logits(), layouts={}
        ) as optimizer,
        pytest.raises(MuondError, match="PARAMETER_INVALID"),
    ):
        optimizer.step()
    muon = [{"parameters": ["w"], "algorithm": "muon", "name": "g"}]
    with Optimizer(
        [("w", weight)],
        muon,
        url=shared.url,
        run=name,
        attentions=attentions,
        max_logits=Logits(),
        layouts={"w": {"matrices": "batch"}},
    ) as optimizer:
        assert optimizer.step().clipped_heads == {"a": 1}
    torch.testing.assert_close(weight.detach(), torch.full((2, 3, 4), 0.5))


def test_callbacks_and_step_hooks_are_called(shared: Service, name: str) -> None:
    model = net()
    seen: list[Any] = []
    with adamw(model, shared, name, callback=lambda receipt: seen.append(receipt.step)) as optimizer:
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *_: seen.append("post"))
        train(model, optimizer, 2)
    assert seen == ["pre", 1, "post", "pre", 2, "post"]


def test_progress_is_a_line_with_the_step_and_what_it_said(
    shared: Service, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = net()
    with adamw(model, shared, name, progress=True) as optimizer:
        train(model, optimizer, 3)
    said = capsys.readouterr().err
    assert name in said
    assert "3 steps" in said
    assert re.search(r"gradient norm [\d.]+, lr 0\.01", said)


def test_progress_without_tqdm_says_what_to_install(monkeypatch: pytest.MonkeyPatch, shared: Service) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'muond[progress]'")):
        AdamW(net().parameters(), url=shared.url, progress=True)


# What goes wrong first


def test_a_service_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(MuondError, match="is muond running there"):
        Muon(matrices(net()), url="ws://127.0.0.1:1")
    with pytest.raises(ValueError, match="has the scheme"):
        Muon(matrices(net()), url="127.0.0.1:8787")


def test_address_and_key_may_come_from_the_environment(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = start("--keys-file", keys_file(tmp_path, {"k": ["step", "read"]}))
    monkeypatch.setenv("MUOND_URL", service.url)
    with pytest.raises(MuondError, match="UNAUTHORIZED"):
        Muon(matrices(net()))
    monkeypatch.setenv("MUOND_TOKEN", "k")
    model = net()
    with muond.Muon(matrices(model), lr=0.02) as optimizer:
        train(model, optimizer, 1)
        assert optimizer.state_dict()["state"][0]["step"] == 1


def test_without_a_name_every_optimizer_is_a_run_of_its_own(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/train gpt.py"])
    names = {Muon(matrices(net()), url=shared.url).run_name for _ in range(2)}
    assert len(names) == 2
    assert all(re.fullmatch(r"train-gpt-\d{8}-\d{6}-[0-9a-f]{6}", name) for name in names)
    monkeypatch.setattr(sys, "argv", [""])
    assert Muon(matrices(net()), url=shared.url).run_name.startswith("python-")


def test_a_run_of_yesterday_is_not_gone_on_with_by_accident(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:
        train(model, optimizer, 2)
    again = adamw(net(), shared, name)
    with pytest.raises(
        MuondError, match="give it another name, load a state_dict of it, or go on with mode='resume'"
    ) as caught:
        again.step()
    assert caught.value.code == "RUN_EXISTS"
    with adamw(model, shared, name, mode="resume") as optimizer:
        train(model, optimizer, 1)
        assert optimizer.step_count == 3
    other = AdamW([torch.zeros(2, requires_grad=True)], url=shared.url, run=name, mode="resume")
    with pytest.raises(MuondError, match="was this run made by another model") as caught:
        other.open()
    assert caught.value.code == "RUN_MISMATCH"


def test_two_optimizers_cannot_write_one_run(shared: Service, name: str) -> None:
    with adamw(net(), shared, name) as first:
        first.open()
        second = adamw(net(), shared, name, mode="resume")
        with pytest.raises(MuondError, match="takeover=True takes the run from it"):
            second.open()
        with adamw(net(), shared, name, mode="resume", takeover=True) as third:
            third.open()
            for parameter in first.param_groups[0]["params"]:
                parameter.grad = torch.zeros_like(parameter)
            with pytest.raises(MuondError, match="TAKEN_OVER"):
                first.step()


def test_a_run_left_in_the_middle_of_a_step_is_ended_with_a_warning(shared: Service, name: str) -> None:
    model = net()
    left = adamw(model, shared, name)
    train(model, left, 1)
    left.run.gradient(0, torch.ones(24, 12).numpy())
    left.run._events.get(timeout=30)
    left.close()
    with adamw(net(), shared, name, mode="resume") as optimizer:
        with pytest.warns(
            UserWarning, match=r"left in the middle of step 2: the momentum of 1 parameters .* \(param.0\)"
        ):
            optimizer.open()
        assert optimizer.step_count == 2


def test_a_closed_optimizer_says_so_and_closing_twice_is_fine(shared: Service, name: str) -> None:
    model = net()
    optimizer = adamw(model, shared, name)
    optimizer.close()
    optimizer.close()
    with pytest.raises(MuondError, match="was closed"):
        train(model, optimizer, 1)


def test_a_run_may_be_deleted_with_its_optimizer(shared: Service, name: str) -> None:
    model = net()
    optimizer = adamw(model, shared, name)
    train(model, optimizer, 1)
    optimizer.close(delete=True)
    with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        adamw(model, shared, name, mode="resume").open()


def test_one_tensor_is_a_group_as_well(shared: Service, name: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    with AdamW([{"params": weight}], lr=0.5, url=shared.url, run=name, **EXACT) as optimizer:
        weight.grad = torch.ones(3)
        optimizer.step()
    assert float(weight.detach()[0]) < 0.6


def conv() -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, 3, 3, 3))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: Muon([("b", nn.Parameter(torch.zeros(3)))]),
            ValueError,
            "'b' has shape [3], muon is for matrices: give it to AdamW",
        ),
        (
            lambda: Muon([("c", conv())]),
            ValueError,
            "say which matrices these are, layouts={'c': {'matrices': 'flatten'}}",
        ),
        (lambda: Muon([("c", conv())], layouts={"d": {}}), ValueError, "say which matrices"),
        (
            lambda: Muon([("w", torch.zeros(2, 2, requires_grad=True))], layouts={"d": {"heads": 1}}),
            ValueError,
            "'d', which is the name of no parameter",
        ),
        (lambda: Muon([("c", conv())], layouts={"c": {"matrix": "flatten"}}), ValueError, "has the key 'matrix'"),
        (
            lambda: AdamW([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]),
            ValueError,
            "no complex parameters",
        ),
        (lambda: AdamW([torch.zeros(2, dtype=torch.int64)]), ValueError, "is torch.int64, expected a floating point"),
        (lambda: AdamW([torch.zeros(2, device="meta", requires_grad=True)]), ValueError, "on the meta device"),
        (lambda: AdamW([torch.zeros(2, 2).to_sparse().requires_grad_()]), ValueError, "expected a dense tensor"),
        (
            lambda: AdamW([torch.zeros(2, requires_grad=True)], capturable=True),
            ValueError,
            "capturable=True is not possible",
        ),
        (lambda: AdamW([]), ValueError, "empty parameter list"),
        (lambda: AdamW([torch.zeros(2)], overlp=True), TypeError, "unexpected keyword argument 'overlp'"),
        (lambda: AdamW([torch.zeros(2)], mode="new"), ValueError, "mode is 'new', expected one of 'create', 'resume'"),
        (lambda: AdamW([torch.zeros(2)], gradient_dtype="int8"), ValueError, "gradient_dtype is 'int8'"),
        (lambda: AdamW([torch.zeros(2)], accumulation_steps=0), ValueError, "accumulation_steps is 0, at least 1"),
        (
            lambda: Optimizer(net().named_parameters()),
            ValueError,
            "Give groups=, for example groups=muond.torch.suggest(model)",
        ),
        (
            lambda: Optimizer(net().parameters(), []),
            TypeError,
            "the parameters are model.named_parameters(), this one is a Parameter",
        ),
        (lambda: Optimizer(net().named_parameters(), [{"name": "g"}]), ValueError, "'g' has neither 'parameters'"),
        (
            lambda: Optimizer(net().named_parameters(), [{"name": "g", "parameters": ["7.*"]}]),
            ValueError,
            "'7.*', which is the name of no parameter",
        ),
        (
            lambda: Optimizer(net().named_parameters(), [{"algorithm": "adamw", "parameters": ["0.*"]}]),
            ValueError,
            "'2.weight' is in 0 groups, expected 1",
        ),
        (
            lambda: Optimizer(net().named_parameters(), [{"algorithm": "adamw", "parameters": ["*", "0.*"]}] * 2),
            ValueError,
            "'0.weight' is in 2 groups",
        ),
        (
            lambda: Optimizer([{"params": net().parameters(), "algorithm": "lion"}]),
            ValueError,
            "the algorithm 'lion', expected one of muon",
        ),
        (lambda: Optimizer([{"params": net().parameters()}]), ValueError, "the algorithm None"),
    ],
)
def test_what_no_run_can_have_is_refused_by_name(
    shared: Service, monkeypatch: pytest.MonkeyPatch, make: Callable[[], object], error: type[Exception], words: str
) -> None:
    monkeypatch.setenv("MUOND_URL", shared.url)
    with pytest.raises(error, match=re.escape(words)):
        make()


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ({"query": "nowhere", "key": 0}, "attention a.query names 'nowhere'"),
        ({"query": torch.zeros(1), "key": 0}, "attention a.query names a Tensor"),
    ],
)
def test_an_attention_of_another_model_is_refused(
    shared: Service, name: str, attention: dict[str, Any], words: str
) -> None:
    attentions = [{"name": "a", "query_heads": 1, "head_dim": 1, **attention}]
    optimizer = AdamW(net().named_parameters(), url=shared.url, run=name, attentions=attentions)
    with pytest.raises(ValueError, match=words):
        optimizer.open()


def test_sparse_gradients_are_refused_before_anything_is_sent(shared: Service, name: str) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    with AdamW(embedding.named_parameters(), url=shared.url, run=name) as optimizer:
        embedding(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match=r"gradient of 'weight' is sparse .*sparse=False"):
            optimizer.step()
        assert not optimizer.run.in_flight
        embedding.weight.grad = None


def test_under_autocast_and_compile_nothing_changes(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    compiled = torch.compile(ours, backend="aot_eager")
    with adamw(ours, shared, name, overlap=True) as remote:
        for model, optimizer in ((compiled, remote), (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2))):
            for step in range(1, 6):
                optimizer.zero_grad()
                x, y = examples(step)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(model(x).float(), y)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    follow(ours, theirs, 1e-2)
