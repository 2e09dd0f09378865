"""Models that FSDP2 shards train as one process does, bit for bit, and go on with another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded
import torch
import torch.distributed as dist
from processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import muond.torch
from muond import Parameter
from muond.steps.parameter import Bound
from muond.steps.ranges import Ranges
from muond.steps.updates import Update
from muond.torch import parts
from muond.torch.apply import Views, apply_updates
from muond.torch.copies import Copies, told
from muond.torch.ranks import Ranks
from muond.torch.shards import local, ranges_of
from muond.torch.slots import Slot, make_slots
from muond.torch.state.place import Followed
from service import Service


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """This process is the only rank: the code of ranks runs where its coverage is seen."""
    sharded.join(0, 1, tmp_path / "meeting")
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def done(shared: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what four processes have done after what two had begun."""
    folder = tmp_path_factory.mktemp("ranks")

    def given(work: str, first: int, last: int, **more: Any) -> dict[str, Any]:
        return {"url": shared.url, "run": f"sharded-{work}-{first}", "steps": [first, last + 1], **more}

    run_ranks(2, folder, sharded.policies, given("policies", 1, 4))
    run_ranks(2, folder, sharded.checkpointed, given("checkpointed", 1, 3, hybrid=False))
    run_ranks(4, folder, sharded.checkpointed, given("checkpointed", 4, 6, hybrid=True))
    run_ranks(4, folder, sharded.hybrid, given("hybrid", 1, 50))
    return folder


def test_ranks_train_as_one_process_and_resume_with_another_number(shared: Service, name: str, tmp_path: Path) -> None:
    module = sharded.model()
    muon = sharded.optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 9))
    muon.close()
    digests: list[list[Any]] = []
    for first, world_size in ((1, 4), (4, 2), (6, 3)):
        last = {1: 4, 4: 6, 6: 9}[first]
        mode = "create" if first == 1 else "resume"
        given = {"url": shared.url, "run": name, "mode": mode, "steps": [first, last]}
        run_ranks(world_size, tmp_path, sharded.main, given)
        digests += json.loads((tmp_path / "digests.json").read_text())
    assert [tuple(one) for one in digests] == expected
    got = torch.load(tmp_path / "weights.pt")
    for key, weights in sharded.whole(module).items():
        assert torch.equal(got[key].view(torch.int32), weights.view(torch.int32)), key


def test_pairs_with_the_same_shards_train_as_one_process(shared: Service, name: str, done: Path) -> None:
    module = sharded.model()
    muon = sharded.optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 51))
    buffers = [muon.state_dict()["state"][i]["momentum_buffer"] for i in (0, 1)]
    muon.close()
    for rank in range(4):
        digests, weights, found = torch.load(done / f"hybrid-{rank}.pt")
        assert digests == expected
        for key, tensor in sharded.whole(module).items():
            assert torch.equal(weights[key].view(torch.int32), tensor.view(torch.int32)), key
        assert all(torch.equal(one, other) for one, other in zip(found, buffers, strict=True))


def test_a_distributed_checkpoint_goes_on_with_another_number_of_ranks(shared: Service, name: str, done: Path) -> None:
    module = sharded.model()
    muon = sharded.optimizer(module, shared.url, f"{name}-alone")
    sharded.train(module, muon, range(1, 7))
    got = torch.load(done / "checkpointed.pt")
    for key, weights in sharded.whole(module).items():
        assert torch.equal(got[key].view(torch.int32), weights.view(torch.int32)), key
    muon.close()


def test_policies_of_fsdp_frozen_and_tied_parameters(done: Path) -> None:
    assert json.loads((done / "policies.json").read_text()) == list(sharded.POLICIES)


@pytest.mark.parametrize(("world_size", "found"), [(2, False), (4, True)])
def test_processes_with_whole_models_send_a_part_each(
    shared: Service, name: str, tmp_path: Path, world_size: int, *, found: bool
) -> None:
    module = sharded.Whole()
    muon = sharded.whole_optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 6))
    given = {"url": shared.url, "run": name, "steps": [1, 6], "found": found}
    run_ranks(world_size, tmp_path, sharded.parallel, given)
    states, sent = [], []
    for rank in range(world_size):
        digests, weights, state, count = torch.load(tmp_path / f"parallel-{world_size}-{rank}.pt")
        assert digests == expected
        for key, tensor in sharded.whole(module).items():
            assert torch.equal(weights[key].view(torch.int32), tensor.view(torch.int32)), key
        states.append(state)
        sent.append(count)
    assert sum(sent) == sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
    assert all(state["muond"] == states[0]["muond"] for state in states)
    # Any of them is the whole state: one process goes on with it.
    alone = sharded.whole_optimizer(sharded.Whole(), shared.url, f"{name}-on")
    alone.load_state_dict(states[1])
    taken, read = states[1]["state"][0]["momentum_buffer"], alone.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(taken, read)
    alone.close()
    muon.close()


def test_where_one_rank_alone_has_the_optimizer_or_each_another_one(shared: Service, name: str, tmp_path: Path) -> None:
    given = {"url": shared.url, "run": name}
    run_ranks(2, tmp_path, sharded.first_alone, given)
    run_ranks(2, tmp_path, sharded.differing, given)


class Second(Copies):
    """A process that follows, whose first one is played by the test."""

    def __init__(self, told: list[Any]) -> None:
        self.is_first = False
        self.told = told

    def meet(self) -> None:
        """There is nobody else."""

    def from_first(self, value: Any) -> Any:
        return self.told.pop(0)

    def _copy(self, weights: Any) -> None:
        for tensor in weights:
            tensor.detach().fill_(1.0)


def test_a_process_that_follows_has_what_the_first_one_has(shared: Service, name: str, one_rank: None) -> None:
    first = sharded.model()
    muon = sharded.optimizer(first, shared.url, name, process_group=dist.group.WORLD)
    module = sharded.model()
    copies = Copies(dist.group.WORLD)
    copies.is_first = False
    copies.meet()
    copies._copy([torch.ones(2, 3).t(), torch.ones(0)])
    with pytest.raises(muond.MuondError, match="the first copy of the model has failed: RuntimeError: no"):
        raise told(RuntimeError("no")) or AssertionError
    (digest,) = sharded.train(first, muon, range(1, 2))
    run = muon.run
    second = sharded.optimizer(module, shared.url, None)
    second._home.copies = Second([])
    assert (second.step_count, second.state_dict()["state"]) == (0, {})
    second._home.copies.told[:] = [(None, None, False), None]
    sharded.backward(module, 1)
    assert second.step() is None
    second._home.copies.told[:] = [
        (muon.receipt, None, True),
        Followed(run.name, run.step_count, run.digest, run.address.url),
    ]
    assert (1, second.step().digest) == digest
    assert (second.step_count, second.run_name) == (1, name)
    assert all(bool((p == 1).all()) for p in module.parameters())
    mine, theirs = second.state_dict(), muon.state_dict()
    assert mine["muond"] == theirs["muond"]
    assert torch.equal(mine["state"][1]["momentum_buffer"], theirs["state"][1]["momentum_buffer"])
    second._home.copies.told[:] = [(None, muond.MuondError("OVER_CAPACITY", "no room"), True)]
    with pytest.raises(muond.MuondError, match="no room"):
        second.step()
    with pytest.raises(RuntimeError, match="is that of the first process with these weights"):
        second.open()
    muon.param_groups[0]["lr"] = -1.0
    sharded.backward(first, 2)
    with pytest.raises(ValueError, match="Learning rate should be >= 0"):
        muon.step()
    second.close()
    muon.close()


def test_a_rank_alone_is_a_member_too(shared: Service, name: str, one_rank: None) -> None:
    alone, module = sharded.model(), sharded.model()
    whole = sharded.optimizer(alone, shared.url, f"{name}-alone")
    sharded.shard(module)
    muon = sharded.optimizer(module, shared.url, name)
    assert sharded.train(module, muon, range(1, 4)) == sharded.train(alone, whole, range(1, 4))
    assert muon.run.members == {0: True}
    for given, expected in zip(module.parameters(), alone.parameters(), strict=True):
        read, of_whole = muon.state[given], whole.state[expected]
        assert read.keys() == of_whole.keys()
        for key, value in read.items():
            found = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(found, of_whole[key]), key
            assert hasattr(value, "full_tensor") == (key != "step")
    state = muon.state_dict()
    digest = muon.run.digest
    muon.load_state_dict(state)
    assert muon.run.digest == digest, "the service has it"
    sharded.train(module, muon, range(4, 5))
    muon.load_state_dict(state)
    assert muon.run.digest not in (digest, state["muond"]["digest"])
    for key, value in muon.state_dict()["state"][0].items():
        before = state["state"][0][key]
        assert torch.equal(*(one.full_tensor() if hasattr(one, "full_tensor") else one for one in (value, before)))
    with pytest.raises(ValueError, match="is checkpoint 'c' of run 'r': go back to it with mode='resume'"):
        muon.load_state_dict({**state, "muond": {"checkpoint": "c", "run": "r"}})
    muon.state[module[0].weight]["step"] = torch.tensor(9.0)
    with pytest.raises(ValueError, match="whose state cannot be written by one rank"):
        muon.step()
    other = sharded.model()
    sharded.shard(other)
    late = sharded.optimizer(other, shared.url, f"{name}-late")
    late.load_state_dict(state)
    assert late.step_count == 0
    assert torch.equal(
        late.state_dict()["state"][0]["momentum_buffer"].full_tensor(),
        state["state"][0]["momentum_buffer"].full_tensor(),
    )
    late.close()
    broken = sharded.optimizer(other, shared.url, f"{name}-broken")
    wrong = {**state, "state": {**state["state"], 1: {"step": torch.tensor(1.0), "momentum_buffer": torch.ones(1)}}}
    for of_open_run in (False, True):
        with pytest.raises((muond.MuondError, ValueError)):
            broken.load_state_dict(wrong)
        if not of_open_run:
            broken.open()
    # The parameters may be others by now.
    group = broken.param_groups[0]
    group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(
        ValueError, match=r"the parameters are not those of run '.*-broken' any more: make a new optimizer"
    ):
        broken.load_state_dict(state)
    broken.close()
    muon.close(delete=True)
    with pytest.raises(muond.MuondError, match="there is no run"):
        sharded.optimizer(module, shared.url, name, mode="resume").open()
    whole.close()


def test_a_model_may_be_sharded_after_the_optimizer_was_made_of_it(shared: Service, name: str, one_rank: None) -> None:
    alone, module = sharded.model(), sharded.model()
    whole = sharded.optimizer(alone, shared.url, f"{name}-alone")
    muon = sharded.optimizer(module, shared.url, name)
    number_of = {id(p): i for i, p in enumerate(module.parameters())}
    sharded.shard(module)
    parameters = list(module.parameters())
    # As Accelerate does with fsdp_version 2.
    for group in muon.param_groups:
        group["params"] = [parameters[number_of[id(p)]] for p in group["params"]]
    assert sharded.train(module, muon, range(1, 4)) == sharded.train(alone, whole, range(1, 4))
    assert muon.run.members == {0: True}
    muon.close()
    whole.close()


def test_a_step_with_nan_is_none(shared: Service, name: str, one_rank: None) -> None:
    module = sharded.model()
    sharded.shard(module)
    with sharded.optimizer(module, shared.url, name) as muon:
        sharded.train(module, muon, range(1, 2))
        before = sharded.whole(module)
        sharded.backward(module, 2, share=float("nan"))
        with pytest.warns(RuntimeWarning, match=r"0\.weight.* and 2 more .* has NaN"):
            assert muon.step() is None
        for key, weights in sharded.whole(module).items():
            assert torch.equal(weights, before[key])
        muon.zero_grad()
        sharded.backward(module, 2)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        receipt = muon.step()
        assert receipt.step == 2
        assert receipt.gradient_norm == pytest.approx(0.1, rel=1e-4)


def test_a_step_takes_the_parameters_without_nan(shared: Service, name: str, one_rank: None) -> None:
    module = sharded.model()
    sharded.shard(module)
    with sharded.optimizer(module, shared.url, name, on_nonfinite="skip_parameter") as muon:
        sharded.train(module, muon, range(1, 2))
        before = sharded.whole(module)
        sharded.backward(module, 2)
        local(module[0].weight.grad)[0, 0] = float("nan")
        receipt = muon.step()
        assert (receipt.step, [error.fields.parameter for error in receipt.refused]) == (2, [0])
        for key, weights in sharded.whole(module).items():
            assert torch.equal(weights, before[key]) == (key == "0.weight"), key


def test_rows_of_a_shard_are_scaled(one_rank: None) -> None:
    tensor = torch.ones(3, 2)
    parameter = Bound(0, "p", (6, 2), "float32", "float32", Ranges([(5, 11)]))
    update = Update(parameter, 0.0, 0.0, None, np.arange(6, dtype=np.float32))
    slot = Slot(0, 0, "p", tensor, (6, 2), Parameter("p", "g", shape=(6, 2)))
    apply_updates([slot], [update], Views())
    assert tensor.reshape(-1).tolist() == [2, 3, 3, 4, 4, 5]


def test_what_cannot_be_sharded_is_refused_by_name(shared: Service, name: str, one_rank: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    two = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))

    def refused(tensors: list[Any], match: str, **options: Any) -> None:
        pairs = [(f"p{i}", torch.nn.Parameter(tensor)) for i, tensor in enumerate(tensors)]
        groups = [{"parameters": ["*"], "algorithm": "sgd", "lr": 0.1}]
        with pytest.raises(ValueError, match=match):
            muond.torch.Optimizer(pairs, groups, url=shared.url, run=name, **options)

    whole = torch.ones(4, 4)
    shard = DTensor.from_local(whole, mesh, [Shard(0)])
    refused([DTensor.from_local(whole, mesh, [Partial()])], r"'p0' has the placement Partial.*reduce it first")
    refused([DTensor.from_local(whole, mesh, [Replicate()])], r"'p0' has the placement Replicate.*fully_shard")
    refused(
        [DTensor.from_local(whole, two, [Shard(0), Shard(1)])], "'p0' is on a mesh of 2 dimensions.*tensor parallelism"
    )
    hybrid = DTensor.from_local(whole, two, [Replicate(), Shard(0)])
    refused([hybrid], "state='checkpoint' is not possible where several processes", state="checkpoint")
    refused([hybrid], "process_group is of whole models", process_group=mesh.get_group())
    refused([shard, whole], "'p1' is whole on every rank, 'p0' is sharded")
    refused([shard, DTensor.from_local(whole, two["shard"], [Shard(0)])], "'p0' and 'p1' are on different meshes")
    refused([shard], "overlap=True is not possible with sharded parameters", overlap=True)
    refused([shard], "keep='cpu' is not possible", keep="cpu")
    flat = torch.nn.Parameter(whole)
    flat._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"'w' is sharded by FullyShardedDataParallel.*FSDP2"):
        muond.torch.Muon([("w", flat)], url=shared.url)


def test_blocks_are_ranges() -> None:
    assert ranges_of((4, 6), (1, 0), (2, 6)) == [(6, 18)]
    assert ranges_of((2, 3, 4), (0, 1, 0), (2, 2, 4)) == [(4, 12), (16, 24)]
    assert ranges_of((2, 3), (0, 1), (2, 1)) == [(1, 2), (4, 5)]
    assert ranges_of((2, 3), (2, 0), (0, 3)) == []
    assert ranges_of((), (), ()) == [(0, 1)]


def test_where_one_rank_cannot_open_none_goes_on(shared: Service, name: str, one_rank: None) -> None:
    module = sharded.model()
    sharded.shard(module)
    muond.torch.Muon([("w", torch.nn.Parameter(torch.ones(2, 2)))], url=shared.url, run=name).open()
    with pytest.raises(muond.MuondError) as caught:
        sharded.optimizer(module, shared.url, name).open()
    assert caught.value.code == "RUN_EXISTS"
    ranks = Ranks.along(init_device_mesh("cpu", (1,)))
    undone: list[int] = []
    ranks.of_all = lambda _: ["ValueError: no"]  # type: ignore[method-assign, assignment]
    with pytest.raises(muond.MuondError, match="another rank cannot open the run: rank 0: ValueError: no"):
        ranks.together(lambda: 1, undone.append)
    assert undone == [1]


def test_a_tensor_that_nobody_shards_is_all_here() -> None:
    tensor = torch.zeros(3)
    assert local(tensor) is tensor


def test_one_process_with_a_group_sends_its_part(
    shared: Service, name: str, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {"process_group": dist.group.WORLD}
    alone, module = sharded.Whole(), sharded.Whole()
    whole = sharded.whole_optimizer(alone, shared.url, f"{name}-alone")
    muon = sharded.whole_optimizer(module, shared.url, name, **group)
    assert sharded.train(module, muon, range(1, 4)) == sharded.train(alone, whole, range(1, 4))
    muon.load_state_dict(muon.state_dict())
    for optimizer, one in ((muon, module), (whole, alone)):
        optimizer.state[one.wide.weight]["momentum_buffer"].zero_()
        optimizer.state_dict()
        optimizer.state[one.wide.weight]["momentum_buffer"].fill_(0.5)
    assert sharded.train(module, muon, range(4, 5)) == sharded.train(alone, whole, range(4, 5))
    muon.param_groups[0]["lr"] = -1.0
    sharded.backward(module, 5)
    with pytest.raises(ValueError, match="Learning rate should be >= 0"):
        muon.step()
    muon.close()
    whole.close()
    late = sharded.whole_optimizer(module, shared.url, name, mode="resume", **group)
    with pytest.raises(RuntimeError, match="all ranks open it together"):
        late.state_dict()

    def fails(_: muond.Receipt) -> None:
        raise KeyError("callback")

    told = sharded.whole_optimizer(module, shared.url, f"{name}-told", callback=fails, **group)
    sharded.backward(module, 6)
    with pytest.raises(KeyError, match="callback"):
        told.step()
    assert told.step_count == 1
    told.close()
    blocks = sharded.whole_optimizer(module, shared.url, f"{name}-blocks", gradient_dtype="int4_block64", **group)
    assert blocks._home.copies is not None
    slots = make_slots(blocks.param_groups, blocks._settings)
    assert parts.are_alike(dist.group.WORLD, slots)
    ddp = torch.nn.parallel.DistributedDataParallel(module)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    assert parts.group_of_ddp([module.turned]) is ddp.process_group
    assert parts.group_of_ddp([alone.turned]) is None
    monkeypatch.setattr(parts, "MEETING_SECONDS", 1)
    with pytest.raises(RuntimeError, match=r"whose ranks \[1\] have taken no step"):
        parts.are_alike(dist.group.WORLD, slots)
