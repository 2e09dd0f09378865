"""state_dict: complete in itself, torch's own names, and a trainer that goes on where it was saved."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import distance, matrices, net, saved_and_loaded, train

from muond import MuondError
from muond.rest import Rest, Take, Tensor
from muond.torch import AdamW, Muon, Optimizer, suggest
from muond.transport.address import endpoint
from peer import Web
from service import Service

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}


def adamw(model: torch.nn.Module, service: Service, name: str | None, **options: Any) -> AdamW:
    return AdamW(model.named_parameters(), lr=1e-2, url=service.url, run=name, **{**EXACT, **options})


def test_before_the_first_step_there_is_no_state(shared: Service, name: str) -> None:
    with adamw(net(), shared, name) as optimizer:
        empty = optimizer.state_dict()
        assert (empty["state"], "muond" in empty) == ({}, False)
        optimizer.load_state_dict(empty)
        optimizer.open()
        opened = optimizer.state_dict()
        assert (opened["state"], opened["muond"]["step"]) == ({}, 0)


def test_a_state_dict_has_torchs_names_shapes_and_values(shared: Service, name: str) -> None:
    ours, theirs = net(), net()
    reference = torch.optim.AdamW(theirs.named_parameters(), lr=1e-2)
    train(theirs, reference, 7)
    with adamw(ours, shared, name) as optimizer:
        train(ours, optimizer, 7)
        state = saved_and_loaded(optimizer.state_dict())
        token = state["muond"]
        assert token == {"version": 1, "run": name, "step": 7, "digest": optimizer.run.digest}
    expected = reference.state_dict()
    assert state["param_groups"][0]["param_names"] == expected["param_groups"][0]["param_names"]
    assert state["param_groups"][0]["params"] == expected["param_groups"][0]["params"]
    for index, entries in expected["state"].items():
        assert set(state["state"][index]) == set(entries)
        for key, value in entries.items():
            assert state["state"][index][key].dtype == value.dtype
            torch.testing.assert_close(state["state"][index][key], value, rtol=1e-4, atol=1e-7)


def test_a_trainer_that_crashed_goes_on_from_its_checkpoint(shared: Service, name: str) -> None:
    alone = net()
    with adamw(alone, shared, f"{name}-alone") as optimizer:
        train(alone, optimizer, 8)
        digest = optimizer.run.digest
    crashed = net()
    optimizer = adamw(crashed, shared, name)
    train(crashed, optimizer, 5)
    kept = saved_and_loaded({"model": crashed.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.close()
    for run in (name, None):
        restarted = net()
        restarted.load_state_dict(kept["model"])
        with adamw(restarted, shared, run) as optimizer:
            optimizer.load_state_dict(kept["optimizer"])
            assert (optimizer.run_name, optimizer.step_count) == (name, 5)
            if run is None:
                train(restarted, optimizer, 3, 6)
                assert optimizer.run.digest == digest
    assert distance(restarted, alone) == 0


def test_a_running_optimizer_can_load_what_it_saved(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name, progress=True) as optimizer:
        train(model, optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.25
        state = optimizer.state_dict()
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.25
        train(model, optimizer, 1, 3)
        assert optimizer.receipt is not None
        assert (optimizer.receipt.step, optimizer.receipt.groups["adamw"]["lr"]) == (3, 0.25)


def test_schedulers_load_beside_it(shared: Service, name: str) -> None:
    alone, model = net(), net()
    reference = torch.optim.AdamW(alone.named_parameters(), lr=1e-2)
    schedule: Any = torch.optim.lr_scheduler.StepLR(reference, 2)
    for step in range(1, 9):
        train(alone, reference, 1, step)
        schedule.step()
    with adamw(model, shared, name) as optimizer:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for step in range(1, 6):
            train(model, optimizer, 1, step)
            schedule.step()
        kept = saved_and_loaded({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
    with adamw(model, shared, name) as optimizer:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        for step in range(6, 9):
            train(model, optimizer, 1, step)
            schedule.step()
    assert distance(model, alone) < 1e-5


def test_several_groups_keep_their_own_rates(shared: Service, name: str) -> None:
    model = net()
    groups = suggest(model, muon={"lr": 0.02}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=shared.url, run=name) as optimizer:
        train(model, optimizer, 2)
        state = optimizer.state_dict()
    assert [group["lr"] for group in state["param_groups"]] == [0.02, 1e-3]
    assert [sorted(entries) for entries in state["state"].values()] == [["momentum_buffer", "step"]] * 2 + [
        ["exp_avg", "exp_avg_sq", "step"]
    ] * 2
    with Optimizer(model.named_parameters(), suggest(model, quiet=True), url=shared.url, run=name) as optimizer:
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.02


# What goes over REST


def test_a_state_is_written_as_safetensors_under_the_names_of_the_parameters(
    shared: Service, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    state = {
        0: {"momentum_buffer": torch.ones(24, 12, dtype=torch.float64), "step": torch.tensor(3.0)},
        1: {"momentum_buffer": torch.zeros(24, dtype=torch.bfloat16), "step": 3},
        2: {"momentum_buffer": torch.ones(6, 24)},
    }
    sent: list[Any] = []
    monkeypatch.setattr(
        Rest,
        "import_state",
        lambda _, run, tensors, metadata, partial: sent.extend(tensors) or {"step": 0, "digest": "d"},
    )
    groups = [{"params": list(model.named_parameters()), "algorithm": "sgd", "lr": 0.5}]
    with Optimizer(groups, url=shared.url, run=name) as optimizer:
        given = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(given)
        assert (optimizer.run.step_count, optimizer.run.digest) == (0, "d")
    assert [(t.name, t.dtype, t.shape) for t in sent] == [
        ("state.0.weight.step", "I64", ()),
        ("state.0.weight.momentum_buffer", "F32", (24, 12)),
        ("state.0.bias.step", "I64", ()),
        ("state.0.bias.momentum_buffer", "BF16", (24,)),
        ("state.2.weight.step", "I64", ()),
        ("state.2.weight.momentum_buffer", "F32", (6, 24)),
        ("state.2.bias.step", "I64", ()),
    ]
    assert [int(t.data.view(np.int64)[0]) for t in sent if t.name.endswith(".step")] == [3, 3, 1, 0]
    assert sent[1].data.view(np.float32).tolist() == [1.0] * 288


def body_of(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (b"", "FRAME_MALFORMED", "the body ends 8 bytes early"),
        (struct.pack("<Q", 1 << 40), "FRAME_MALFORMED", "a header of 1099511627776 bytes"),
        (struct.pack("<Q", 5) + b"{", "FRAME_MALFORMED", "the body ends 4 bytes early"),
        (struct.pack("<Q", 2) + b"{]", "FRAME_MALFORMED", "no safetensors body"),
        (
            body_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12"),
            "FRAME_MALFORMED",
            "2 bytes early",
        ),
        (
            body_of(
                {
                    "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    "y": {"dtype": "F32", "shape": [1.0], "data_offsets": [4, 8]},
                },
                bytes(8),
            ),
            "FRAME_MALFORMED",
            r"'y' is described as .*1\.0",
        ),
    ],
)
def test_what_is_no_state_is_refused(body: bytes, code: str, words: str) -> None:
    with Web(200, body) as web, Rest(endpoint(web.url)) as rest, pytest.raises(MuondError, match=words) as caught:
        rest.state("r")
    assert caught.value.code == code


def test_a_dtype_that_this_client_does_not_know_is_refused(
    shared: Service, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    with adamw(model, shared, name) as optimizer:
        train(model, optimizer, 1)
        read = Rest.read_state

        def other(rest: Rest, run: str, begin: Callable[[], Take]) -> dict[str, str]:
            def take(t: Tensor) -> None:
                begun(t._replace(dtype="U8") if t.name.endswith("exp_avg") else t)

            begun = begin()
            return read(rest, run, lambda: take)

        monkeypatch.setattr(Rest, "read_state", other)
        with pytest.raises(MuondError, match=r"'state\.0\.weight\.exp_avg' has dtype U8"):
            optimizer.state_dict()


def test_rest_reads_what_the_service_knows(shared: Service, name: str) -> None:
    model = net()
    with Muon(matrices(model), url=shared.url, run=name) as optimizer:
        train(model, optimizer, 2)
        with Rest(optimizer.run.address) as rest:
            assert rest.run(name)["step"] == 2
            assert "muon" in rest.capabilities()["algorithms"]
            tensors, metadata = rest.state(name)
            assert [tensor.name for tensor in tensors] == [
                *("state.0.weight.step", "state.2.weight.step"),
                *("state.0.weight.momentum_buffer", "state.2.weight.momentum_buffer"),
            ]
            assert (metadata["step"], metadata["digest"]) == ("2", optimizer.run.digest)
            assert [tensor.name for tensor in rest.counts(name)] == ["state.0.weight.step", "state.2.weight.step"]
            with pytest.raises(MuondError, match="was refused") as caught:
                rest.state("nothing")
            assert caught.value.code == "RUN_NOT_FOUND"


def test_a_rest_service_that_is_gone_or_says_nonsense(start: Callable[..., Service]) -> None:
    service = start()
    address = endpoint(service.url)
    service.kill()
    with Rest(address) as rest, pytest.raises(MuondError, match=r"GET /v1/capabilities at 127\.0\.0\.1:") as caught:
        rest.capabilities()
    assert caught.value.code == "CONNECTION_LOST"
    with (
        Web(200, b"[]") as web,
        Rest(endpoint(web.url)) as rest,
        pytest.raises(MuondError, match="answered with a list"),
    ):
        rest.capabilities()
    with Web(200, b"{") as web, Rest(endpoint(web.url)) as rest, pytest.raises(MuondError, match="is no JSON"):
        rest.capabilities()
    with (
        Web(500, b"oops") as web,
        Rest(endpoint(web.url)) as rest,
        pytest.raises(MuondError, match="with HTTP status 500"),
    ):
        rest.import_state("r", [Tensor("x", "U8", (1,), np.zeros(1, np.uint8))], {})
