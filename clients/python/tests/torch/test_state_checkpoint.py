"""A state_dict whose state is a checkpoint of the service, what a restart means for one, and its hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import distance, net, saved_and_loaded, train
from patient import STEPS, adamw
from torch import nn

import muond
from muond import MuondError
from muond.rest import Rest
from muond.transport.address import endpoint
from peer import Web
from service import Service, damage, limit_file_size


def test_a_state_dict_may_name_a_checkpoint_and_stays_good_however_many_follow(
    durable: Callable[..., Service], name: str, alone: tuple[nn.Module, str]
) -> None:
    service = durable("--checkpoints-kept", "1", "--checkpoint-steps", "1")
    model = net()
    optimizer = adamw(model, service, name, state="checkpoint")
    assert "muond" not in optimizer.state_dict()
    saved = {}
    for step in range(1, 7):
        train(model, optimizer, 1, step)
        if step in (3, 5):
            saved[step] = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.close()
    assert saved[3]["optimizer"]["state"] == {}
    assert saved[3]["optimizer"]["muond"]["step"] == 3
    for run, step in ((name, 5), (None, 3)):
        restarted = net()
        restarted.load_state_dict(saved[step]["model"])
        with adamw(restarted, service, run, state="checkpoint", progress=True) as again:
            again.load_state_dict(saved[step]["optimizer"])
            assert (again.run_name, again.step_count) == (name, step)
            if step == 3:
                train(restarted, again, STEPS - 3, 4)
                assert again.run.digest == alone[1]
    assert distance(restarted, alone[0]) == 0


def test_loading_where_the_run_is_already_changes_nothing(durable: Callable[..., Service], name: str) -> None:
    model = net()
    with adamw(model, durable(), name, state="checkpoint") as optimizer:
        train(model, optimizer, 2)
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        assert optimizer.run.opened["epoch"] == 1
        train(model, optimizer, 1, 3)
        optimizer.load_state_dict(state)
        assert optimizer.step_count == 2


def test_the_checkpoint_of_a_state_dict_is_a_way_on_for_a_damaged_run(
    durable: Callable[..., Service], name: str, tmp_path: Path
) -> None:
    service = durable()
    model = net()
    with adamw(model, service, name, state="checkpoint") as optimizer:
        train(model, optimizer, 1)
        state = saved_and_loaded(optimizer.state_dict())
        train(model, optimizer, 1, 2)
        newest = optimizer.checkpoint()
    service.kill()
    damage(tmp_path, name, newest.id)
    service.restart()
    with adamw(net(), service, name) as optimizer:
        optimizer.load_state_dict(state)
        assert (optimizer.step_count, optimizer.run.digest) == (1, state["muond"]["digest"])


def test_a_state_dict_of_another_run_is_a_branch_of_that(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    states = {}
    for run, first in ((f"{name}-a", 1), (f"{name}-b", 2)):
        model = net()
        with adamw(model, service, run, state="checkpoint") as optimizer:
            train(model, optimizer, 1, first)
            states[run] = optimizer.state_dict()
    with adamw(net(), service, f"{name}-b") as optimizer:
        optimizer.load_state_dict(states[f"{name}-a"])
        assert (optimizer.run_name, optimizer.run.digest) == (f"{name}-b.2", states[f"{name}-a"]["muond"]["digest"])
        optimizer.load_state_dict(states[f"{name}-b"])
        assert (optimizer.run_name, optimizer.run.digest) == (f"{name}-b", states[f"{name}-b"]["muond"]["digest"])
    with adamw(net(), service, f"{name}-c") as optimizer:
        optimizer.load_state_dict(states[f"{name}-a"])
        assert (optimizer.run_name, optimizer.step_count) == (f"{name}-c", 1)
        assert optimizer.run.opened["note"] == f"branched from step-000000000001 of run '{name}-a'"
    with Rest(optimizer._addresses.first) as rest:
        assert rest.run(f"{name}-a")["digest"] == states[f"{name}-a"]["muond"]["digest"]


def test_a_checkpoint_of_another_history_is_not_branched_from(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    with adamw(model := net(), service, name, state="checkpoint") as optimizer:
        train(model, optimizer, 1)
        state = optimizer.state_dict()
    state["muond"]["digest"] = "0" * 64
    with adamw(net(), service, None) as optimizer, pytest.raises(MuondError, match="it is of another history"):
        optimizer.load_state_dict(state)
    with adamw(net(), service, f"{name}-b") as optimizer:
        with pytest.raises(MuondError, match="it is of another history"):
            optimizer.load_state_dict(state)
        state["muond"]["run"] = f"{name}-none"
        with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
            optimizer.load_state_dict(state)
    with Rest(optimizer._addresses.first) as rest, pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        rest.run(f"{name}-b")


def test_dictionaries_of_two_branches_are_gone_to_and_back(durable: Callable[..., Service], name: str) -> None:
    service = durable("--checkpoints-kept", "1", "--checkpoint-steps", "1")
    model = net()
    with adamw(model, service, name, state="checkpoint") as optimizer:
        train(model, optimizer, 2)
        start = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        branches = []
        for first in (10, 20):
            model.load_state_dict(start["model"])
            optimizer.load_state_dict(start["optimizer"])
            train(model, optimizer, 2, first)
            branches.append(saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
            train(model, optimizer, 2, first + 2)
        for restarted in (False, True):
            if restarted:
                service.kill_and_restart()
            for branch in (*branches, start, *branches):
                model.load_state_dict(branch["model"])
                optimizer.load_state_dict(branch["optimizer"])
                expected = branch["optimizer"]["muond"]
                assert (optimizer.run_name, optimizer.step_count) == (name, expected["step"])
                assert optimizer.run.digest == expected["digest"]
                train(model, optimizer, 1, 30)


def test_state_is_never_saved_of_another_step_than_the_weights(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    model = net()
    with adamw(model, service, name) as optimizer:
        train(model, optimizer, 1)
        optimizer.checkpoint()
        train(model, optimizer, 1, 2)
        service.kill_and_restart()
        with pytest.raises(
            MuondError, match=r"is at step 1 with digest .* in the service, this client at step 2"
        ) as caught:
            optimizer.state_dict()
        assert (caught.value.code, caught.value.fields.expected_step) == ("STEP_CONFLICT", 2)


def test_nor_while_another_trainer_has_begun_a_step(shared: Service, name: str) -> None:
    model = net()
    with adamw(model, shared, name, overlap=True) as optimizer, adamw(net(), shared, name) as other:
        train(model, optimizer, 1)
        run = muond.open_run(
            shared.url, run=name, takeover=True, parameters=[slot.declaration for slot in optimizer._home.slots]
        )
        run.gradient_bytes(0, memoryview(bytes(run.parameters[0].gradient_bytes)))
        run._events.get(timeout=30)
        with pytest.raises(MuondError, match="in the service, with step 2 begun, this client at step 1"):
            optimizer.state_dict()
        run.close()
        del other


def test_state_is_read_through_a_restart(durable: Callable[..., Service], name: str) -> None:
    service = durable("--durability", "journal")
    model = net()
    with adamw(model, service, name) as optimizer:
        train(model, optimizer, 2)
        before = optimizer.state_dict()
        service.kill()
        again = threading.Thread(target=service.restart)
        again.start()
        after = optimizer.state_dict()
        again.join()
    assert before["muond"] == after["muond"]
    for index, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entries.items())


def test_a_run_that_is_being_restored_is_asked_again() -> None:
    problem = b'{"code": "RESTORING", "status": 503, "retryable": true, "detail": "waits to be restored"}'
    busy = (503, problem, {"Retry-After": "0"})
    with Web(200, b'{"step": 3}', before=[busy, busy]) as web:
        with Rest(endpoint(web.url), 2, muond.Backoff(0.001, 0.001)) as rest:
            assert rest.run("r") == {"step": 3}
        assert len(web.requests) == 3
    with (
        Web(200, b"{}", before=[busy, busy]) as web,
        Rest(endpoint(web.url), 1, muond.Backoff(0.001, 0.001)) as rest,
        pytest.raises(MuondError, match="waits to be restored") as caught,
    ):
        rest.run("r")
    assert caught.value.code == "RESTORING"
    assert caught.value.retryable
    # An answer that was cut off is asked for again too, and is no word of the service.
    short = (200, b"12", {"Content-Length": "1000"})
    body = b"\x02\0\0\0\0\0\0\0{}"
    with Web(200, body, before=[short]) as web:
        with Rest(endpoint(web.url), 1, muond.Backoff(0.001, 0.001)) as rest:
            assert rest.state("r") == ([], {})
        assert len(web.requests) == 2
    # What had come by then comes again, and counts once.
    header = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}'
    file = len(header).to_bytes(8, "little") + header
    cut = (200, file + b"\1", {"Content-Length": str(len(file) + 3)})
    with (
        Web(200, file + b"\1\2\3", before=[cut]) as web,
        Rest(endpoint(web.url), 1, muond.Backoff(0.001, 0.001)) as rest,
    ):
        tensors, _ = rest.state("r")
        assert [(tensor.name, tensor.data.tolist()) for tensor in tensors] == [("a", [1]), ("b", [2, 3])]
        assert len(web.requests) == 2
    with (
        Web(200, b'{"cut', {"Content-Length": "1000"}) as web,
        Rest(endpoint(web.url)) as rest,
        pytest.raises(MuondError, match=r"an answer of 127\.0\.0\.1:\d+ was cut off") as caught,
    ):
        rest.run("r")
    assert caught.value.code == "CONNECTION_LOST"


def test_a_full_disk_is_waited_for(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    waits: list[float] = []

    def random() -> float:
        waits.append(1)
        limit_file_size(service, -1)
        return 0.0

    model = net()
    with adamw(model, service, name, state="checkpoint", backoff=muond.Backoff(0.001, 0.001, random)) as optimizer:
        train(model, optimizer, 1)
        limit_file_size(service, 100)
        assert optimizer.state_dict()["muond"]["step"] == 1
    assert waits


def test_hooks_see_what_is_saved_and_may_change_what_is_loaded(durable: Callable[..., Service], name: str) -> None:
    model = net()
    with adamw(model, durable(), name, state="checkpoint") as optimizer:
        seen: list[Any] = []
        optimizer.register_state_dict_post_hook(lambda _, state: seen.append(dict(state)), prepend=True)
        optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "muond": saved["muond"]})
        optimizer.register_load_state_dict_post_hook(lambda it: seen.append(it.step_count))
        train(model, optimizer, 2)
        saved = optimizer.state_dict()
        assert seen == [saved]
        train(model, optimizer, 1, 3)
        # The hook brings the token back that says where to go.
        optimizer.load_state_dict({key: value for key, value in saved.items() if key != "muond"})
        assert seen[1:] == [2]
        assert optimizer.step_count == 2
        assert "muond" in optimizer.state_dict()
        assert len(seen) == 3
