"""An optimizer whose run has several shards: nothing is configured but where a process of the service is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded
import torch
from models import net, saved_and_loaded, train
from processes import run_ranks
from torch import nn

from cluster import Cluster
from muond import MuondError
from muond.torch import AdamW, DiLoCo, Optimizer, suggest
from muond.torch.state.loading import _is_left
from muond.transport.address import addresses
from peer import Web
from service import Service, build


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two processes that spread each run over both."""
    build()
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 2, "--shards", "2", data=True)
    yield cluster
    cluster.stop()


def whole_model(model: nn.Module, url: str | list[str], run: str | None, **options: object) -> Optimizer:
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
    given = {"url": url, "run": run, "gradient_dtype": "float32", "update_dtype": "float32", **options}
    return Optimizer(model.named_parameters(), groups, **given)  # type: ignore[arg-type]


def same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def entries(state: dict[str, object]) -> str:
    """The tensors of a state_dict, as text that says every bit."""
    found: dict[int, dict[str, torch.Tensor]] = state["state"]  # type: ignore[assignment]
    return json.dumps({i: {name: one[name].tolist() for name in sorted(one)} for i, one in sorted(found.items())})


BLOCKS = {"gradient_dtype": "int8_block256", "update_dtype": "int4_block64"}


@pytest.mark.parametrize(("options", "more"), [({}, {}), ({}, {"overlap": True}), (BLOCKS, {})])
def test_an_optimizer_trains_as_over_one_process(
    shared: Service, cluster: Cluster, name: str, options: dict[str, object], more: dict[str, object]
) -> None:
    one, many = net(), net()
    with (
        whole_model(one, shared.url, name, **options) as alone,
        whole_model(many, ["ws://127.0.0.1:9", *cluster.urls], name, **options, **more) as optimizer,
    ):
        assert train(one, alone, 3) == train(many, optimizer, 3)
        assert optimizer.run.is_whole
        assert len(optimizer.run.opened["shards"]) == 2
        assert optimizer.receipt.digest == alone.receipt.digest  # type: ignore[union-attr]
        assert same(one, many)
        assert len(optimizer.state) == len(list(many.parameters()))
        state, expected = optimizer.state_dict(), alone.state_dict()
        assert entries(state) == entries(expected)
        assert state["muond"]["digest"] == expected["muond"]["digest"]
        # A process of one shard goes on with it, and so does the run that has it already.
        third = net()
        third.load_state_dict(many.state_dict())
        with whole_model(third, shared.url, f"{name}-on", **options) as other:
            other.load_state_dict(saved_and_loaded(state))
            optimizer.load_state_dict(saved_and_loaded(state))
            assert train(third, other, 2, first=4) == train(many, optimizer, 2, first=4)
            assert same(third, many)
        optimizer.close(delete=True)
        with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
            whole_model(net(), cluster.urls, name, mode="resume").open()


def test_what_needs_state_to_be_imported_is_refused_and_the_run_goes_on(cluster: Cluster, name: str) -> None:
    model = net()
    with whole_model(model, cluster.urls, name) as optimizer:
        train(model, optimizer, 2)
        old = optimizer.state_dict()
        train(model, optimizer, 1, first=3)
        for refused in (
            lambda: deepcopy(optimizer).step(),
            lambda: optimizer.load_state_dict(old),
            lambda: whole_model(net(), cluster.urls, f"{name}-2").load_state_dict(old),
        ):
            with pytest.raises(MuondError, match="which 2 processes have together") as caught:
                refused()
            assert caught.value.code == "STATE_INVALID"
        weight = model[0].weight
        optimizer.state[weight]["momentum_buffer"].zero_()
        with pytest.raises(MuondError, match="which 2 processes have together"):
            train(model, optimizer, 1, first=4)
        optimizer.state.moved()
        assert train(model, optimizer, 1, first=4)
        assert optimizer.step_count == 4
        # A run of one process takes it.
        other = net()
        with whole_model(other, cluster.urls, f"{name}-3", shards=1) as one:
            one.load_state_dict(old)
            assert not one.run.is_whole
            assert entries(one.state_dict()) == entries(old)


def test_one_replica_of_diloco_has_shards_and_several_are_refused(shared: Service, cluster: Cluster, name: str) -> None:
    models = [net(), net()]
    for url, model in zip((shared.url, cluster.urls), models, strict=True):
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with DiLoCo(model, inner, sync_every=2, url=url, run=name) as optimizer:
            train(model, optimizer, 4)
            assert optimizer.outer.run.is_whole == (url != shared.url)
    assert same(*models)
    inner = torch.optim.SGD(models[0].parameters(), lr=0.1)
    with (
        DiLoCo(models[0], inner, url=cluster.urls, run=f"{name}-2", replica=0, replicas=2) as optimizer,
        pytest.raises(MuondError, match="cannot have replicas"),
    ):
        optimizer.outer.open()


def test_checkpoints_are_gone_back_to(cluster: Cluster, name: str) -> None:
    model = net()
    with whole_model(model, cluster.urls, name, keep="cpu") as optimizer:
        train(model, optimizer, 2)
        assert optimizer.checkpoint().step == 2
        losses = train(model, optimizer, 2, first=3)
        assert optimizer.rollback() == 2
        assert train(model, optimizer, 2, first=3) == losses
    with whole_model(model, cluster.urls, name, mode="resume", state="checkpoint") as optimizer:
        weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state = saved_and_loaded(optimizer.state_dict())
        losses = train(model, optimizer, 2, first=5)
        for load in (lambda: optimizer.load_state_dict(state), optimizer.close):
            load()
            model.load_state_dict(weights)
    with whole_model(model, cluster.urls, name, mode="resume") as optimizer:
        optimizer.load_state_dict(state)
        assert train(model, optimizer, 2, first=5) == losses
    with (
        whole_model(net(), cluster.urls, f"{name}-2") as optimizer,
        pytest.raises(MuondError, match="PARAMETER_INVALID"),
    ):
        optimizer.load_state_dict(state)


def test_a_run_without_a_name_is_found_by_its_state_wherever_it_is(cluster: Cluster) -> None:
    for shards in (1, 2):
        model = net()
        with AdamW(model.named_parameters(), url=cluster.urls[0], shards=shards) as optimizer:
            train(model, optimizer, 2)
            state = saved_and_loaded(optimizer.state_dict())
            optimizer.checkpoint("kept")
        for url in cluster.urls:
            with AdamW(model.named_parameters(), url=url) as optimizer:
                optimizer.load_state_dict(state)
                assert (optimizer.run_name, optimizer.step_count) == (state["muond"]["run"], 2)
                assert optimizer.run.is_whole == (shards == 2)
        with AdamW(
            model.named_parameters(), url=cluster.urls[0], run=state["muond"]["run"], mode="resume"
        ) as optimizer:
            train(model, optimizer, 1, first=3)
        # Somebody has taken it further: it stays as it is.
        for url in cluster.urls:
            optimizer = AdamW(model.named_parameters(), url=url, shards=1)
            optimizer.load_state_dict(state)
            assert (optimizer.run_name == state["muond"]["run"], optimizer.run.is_whole) == (False, False)
            optimizer.close(delete=True)
        state["muond"]["run"] += ".none"
        with AdamW(model.named_parameters(), url=cluster.urls, shards=1) as optimizer:
            optimizer.load_state_dict(state)
            assert optimizer.run_name == state["muond"]["run"]


def test_a_run_that_cannot_be_asked_for_is_not_taken() -> None:
    with Web(500, b"{}") as web:
        home: Any = SimpleNamespace(
            settings=SimpleNamespace(run=None), addresses=addresses(web.url), rest_at=lambda kind, at: kind(at)
        )
        assert not _is_left(home, {"run": "r"})


def test_a_dropped_optimizer_takes_its_run_with_it_unless_a_data_folder_keeps_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    forgetful = Cluster(tmp_path, 2, "--shards", "2")
    names = []
    for urls in (forgetful.urls, cluster.urls):
        model = net()
        optimizer = AdamW(model.named_parameters(), url=urls)
        train(model, optimizer, 1)
        names.append(optimizer.run_name)
        del optimizer
    with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        AdamW(net().named_parameters(), url=forgetful.urls, run=names[0], mode="resume").open()
    forgetful.stop()
    with AdamW(net().named_parameters(), url=cluster.urls, run=names[1], mode="resume") as optimizer:
        assert optimizer.open().step_count == 1


def test_shards_of_a_model_and_shards_of_the_service(
    shared: Service, cluster: Cluster, name: str, tmp_path: Path
) -> None:
    module = sharded.model()
    muon = sharded.optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 7))
    muon.close()
    digests: list[list[object]] = []
    for first, last, mode in ((1, 4, "create"), (4, 7, "resume")):
        given = {"url": cluster.urls, "run": name, "mode": mode, "steps": [first, last]}
        run_ranks(2, tmp_path, sharded.main, given)
        digests += json.loads((tmp_path / "digests.json").read_text())
    assert [tuple(one) for one in digests] == expected
    got = torch.load(tmp_path / "weights.pt")
    for key, weights in sharded.whole(module).items():
        assert torch.equal(got[key].view(torch.int32), weights.view(torch.int32)), key


def test_processes_with_whole_models_and_shards_of_the_service(
    shared: Service, cluster: Cluster, name: str, tmp_path: Path
) -> None:
    module = sharded.Whole()
    muon = sharded.whole_optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 5))
    before = entries(muon.state_dict())
    expected += sharded.train(module, muon, range(5, 6))
    given = {"url": cluster.urls[0], "run": name, "steps": [1, 6], "found": True}
    run_ranks(2, tmp_path, sharded.parallel, given)
    for rank in range(2):
        digests, weights, state, _ = torch.load(tmp_path / f"parallel-2-{rank}.pt")
        assert digests == expected
        for key, tensor in sharded.whole(module).items():
            assert torch.equal(weights[key].view(torch.int32), tensor.view(torch.int32)), key
        assert entries(state) == before
    muon.close()


def test_pairs_with_the_same_shards_follow_a_run_of_several_processes(
    shared: Service, cluster: Cluster, name: str, tmp_path: Path
) -> None:
    module = sharded.model()
    muon = sharded.optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 4))
    run_ranks(4, tmp_path, sharded.hybrid, {"url": cluster.urls[0], "run": name, "steps": [1, 4]})
    for rank in range(4):
        digests, weights, found = torch.load(tmp_path / f"hybrid-{rank}.pt")
        assert digests == expected
        for key, tensor in sharded.whole(module).items():
            assert torch.equal(weights[key].view(torch.int32), tensor.view(torch.int32)), key
        buffers = [muon.state_dict()["state"][i]["momentum_buffer"] for i in (0, 1)]
        assert all(torch.equal(one, two) for one, two in zip(found, buffers, strict=True))
    muon.close()
