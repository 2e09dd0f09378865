"""A trainer whose model is sharded over processes (FSDP2, gloo): what each rank runs, and the same without ranks."""

from __future__ import annotations

import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import muond.torch
from muond import MuondError
from muond.torch import parts

WIDTH = 6


def model() -> torch.nn.Sequential:
    """Rows that no number of ranks divides: (5, 6), (5,), (6, 5), (1, 6)."""
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 5), torch.nn.Tanh(), torch.nn.Linear(5, WIDTH, bias=False), torch.nn.Linear(WIDTH, 1)
    )


def optimizer(module: torch.nn.Module, url: str, run: str, **options: Any) -> muond.torch.Optimizer:
    groups = [
        {"parameters": ["0.weight", "2.weight"], "algorithm": "muon", "lr": 0.02, "name": "matrices"},
        {"parameters": ["*.bias", "3.weight"], "algorithm": "adamw", "lr": 0.01, "name": "rest"},
    ]
    given = {"url": url, "run": run, "gradient_dtype": "float32", "update_dtype": "float32", **options}
    return muond.torch.Optimizer(module.named_parameters(), groups, **given)


def backward(module: torch.nn.Module, step: int, *, share: float = 1.0) -> None:
    """The loss of a batch that is the same on every rank, times this rank's share of it."""
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, WIDTH, generator=generator)
    loss = (module(batch) - batch.sum(1, keepdim=True)).square().mean()
    (loss * share).backward()


def train(
    module: torch.nn.Module, muon: muond.torch.Optimizer, steps: range, *, share: float = 1.0
) -> list[tuple[int, str]]:
    """(step, digest) of each step; the learning rate is another one in each."""
    digests: list[tuple[int, str]] = []
    for step in steps:
        muon.zero_grad()
        for group in muon.param_groups:
            group["lr"] = 0.02 / step
        backward(module, step, share=share)
        receipt = muon.step()
        digests.append((receipt.step, receipt.digest))
    return digests


def shard(module: torch.nn.Module, mesh: Any = None, **how: Any) -> None:
    fully_shard(module, mesh=mesh, **how)
    # The gradient is the sum over the ranks, of which one has all of it: no rounding of a mean tells them from one process.
    module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    # What gloo has in place of a sum with a factor.
    module.set_force_sum_reduction_for_comms(enable=True)  # type: ignore[operator]


def whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().full_tensor().clone() if hasattr(p, "full_tensor") else p.detach().clone()
        for name, p in module.named_parameters()
    }


def join(rank: int, world_size: int, meeting: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )


def skip_nan(module: torch.nn.Module, muon: muond.torch.Optimizer, *, is_bad: bool) -> None:
    """A step in which one rank has NaN is none, on every rank."""
    backward(module, 1)
    gradients: Any = [p.grad for p in module.parameters()]
    if is_bad:
        for gradient in gradients:
            gradient.to_local().fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert muon.step() is None


def main(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Takes ``steps`` with the weights of ``weights``, if there is such a file, and leaves those it comes to there."""
    module = model()
    weights = folder / "weights.pt"
    if weights.exists():
        module.load_state_dict(torch.load(weights))
    shard(module)
    muon = optimizer(module, given["url"], given["run"], mode=given["mode"])
    if given["mode"] == "create":
        # The last rank may have no elements.
        skip_nan(module, muon, is_bad=rank == 1)
    digests = train(module, muon, range(*given["steps"]), share=float(rank == 0))
    state = whole(module)
    assert muon.run.transport == "shm"
    muon.close()
    if rank == 0:
        torch.save(state, weights)
        (folder / "digests.json").write_text(json.dumps(digests))


def hybrid(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Two times two processes: shards in each pair, and both pairs have the same."""
    module = model()
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    shard(module, mesh)
    muon = optimizer(module, given["url"], given["run"])
    skip_nan(module, muon, is_bad=rank == 1)
    digests = train(module, muon, range(*given["steps"]), share=float(rank == 0))
    state = whole(module)
    assert muon.step_count == given["steps"][1] - 1
    assert muon.run_name == given["run"]
    entries = muon.state_dict()["state"]
    meet(muon, folder)
    torch.save(
        (digests, state, [entries[i]["momentum_buffer"].full_tensor() for i in (0, 1)]), folder / f"hybrid-{rank}.pt"
    )
    if rank > 1:
        with pytest.raises(RuntimeError, match="is that of the first process with these weights"):
            muon.open()
    # A step that fails on the pair that has the run fails on the other one, too.
    muon.zero_grad()
    backward(module, 1, share=float(rank == 0))
    muon.param_groups[0]["lr"] = -1.0
    with pytest.raises((MuondError, ValueError), match="Learning rate should be >= 0"):
        muon.step()
    for name, tensor in whole(module).items():
        assert torch.equal(tensor, state[name])
    muon.close()


def meet(muon: muond.torch.Optimizer, folder: Path) -> None:
    """The first copy does not begin while the other one still reads the state that this would move."""
    copies = muon._home.copies
    assert copies is not None
    pair = dist.get_rank() % 2
    called, read = folder / f"called-{pair}", folder / f"read-{pair}"
    if copies.is_first:
        called.touch()
        copies.take(lambda: pytest.fail("it began at once") if not read.exists() else None, [])
        return
    while not called.exists():
        pass
    muon.state_dict()
    read.touch()
    assert copies.take(lambda: pytest.fail("it is the first one's to take"), []) is None


def checkpointed(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Goes on from what torch.distributed.checkpoint has of any number of ranks, and leaves it more."""
    module = model()
    mesh = None
    if given["hybrid"]:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    shard(module, mesh)
    muon = optimizer(module, given["url"], given["run"])
    where = folder / "checkpoint"
    if where.exists():
        state = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, muon)}
        dcp.load(state, checkpoint_id=where)
        set_model_state_dict(module, state["model"])
        set_optimizer_state_dict(module, muon, state["optimizer"])
        taken = muon.state_dict()
        digest = taken["muond"]["digest"]
        # What the service has already is not sent again.
        muon.load_state_dict(taken)
        assert muon.state_dict()["muond"]["digest"] == digest
    train(module, muon, range(*given["steps"]), share=float(rank == 0))
    state = {"model": get_model_state_dict(module), "optimizer": get_optimizer_state_dict(module, muon)}
    dcp.save(state, checkpoint_id=where)
    weights = whole(module)
    if rank == 0:
        torch.save(weights, folder / "checkpointed.pt")
    muon.close()


class Tied(torch.nn.Module):
    """An embedding that is the head as well, a frozen layer, and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(10, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.trained = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.trained(self.frozen(self.embedding(tokens))))
        return logits


POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"reshard_after_forward": False},
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def tied_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step with gradients that are clipped over all ranks."""
    tokens = torch.randint(10, (4, 7), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    logits = module(tokens[:, :-1]).flatten(0, 1).float()
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
    optimizer.step()


def policies(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Beside torch's own SGD of the same shards: the same weights."""
    for policy, how in POLICIES.items():
        ours, theirs = Tied(), Tied()
        for module in (ours, theirs):
            fully_shard(module.trained, **how)
            fully_shard(module, **how)
        groups = [{"parameters": ["*"], "algorithm": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}]
        options: Any = {"url": given["url"], "run": f"{given['run']}-{policy}"}
        muon = muond.torch.Optimizer(
            ours.named_parameters(), groups, gradient_dtype="float32", update_dtype="float32", **options
        )
        sgd = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.1, 0.9, nesterov=True)
        for step in range(4):
            tied_step(ours, muon, 10 * step + rank)
            tied_step(theirs, sgd, 10 * step + rank)
        before, after = whole(Tied()), whole(ours)
        for name, expected in whole(theirs).items():
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6, msg=f"{policy}: {name}")
            assert torch.equal(after[name], before[name]) == name.startswith("frozen"), name
        assert muon.receipt is not None
        assert muon.receipt.gradient_norm <= 0.0501
        muon.close()
    (folder / "policies.json").write_text(json.dumps(list(POLICIES)))


class Whole(torch.nn.Module):
    """Parameters that are cut, that have one owner because they are small, and one that does not lie row after row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.wide = torch.nn.Linear(WIDTH, 3001)
        self.narrow = torch.nn.Linear(3001, WIDTH, bias=False)
        self.turned = torch.nn.Parameter(torch.randn(1, WIDTH, 3000).transpose(1, 2)[0].t())
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.wide(x))
        return (self.narrow(hidden) + hidden[:, 1:] @ self.turned.t()).sum(1, keepdim=True)


def whole_optimizer(module: torch.nn.Module, url: str, run: str, **options: Any) -> muond.torch.Optimizer:
    groups = [
        {"parameters": ["*.weight", "turned"], "algorithm": "muon", "lr": 0.02, "name": "matrices"},
        {"parameters": ["*.bias", "frozen"], "algorithm": "adamw", "lr": 0.01, "name": "rest"},
    ]
    given = {"url": url, "run": run, "gradient_dtype": "float32", "update_dtype": "float32", **options}
    return muond.torch.Optimizer(module.named_parameters(), groups, **given)


def fail_once(run: muond.Run) -> None:
    """The next ``end`` is not sent."""
    end = run.end

    def fail(**_: Any) -> None:
        run.end = end  # type: ignore[method-assign]
        raise MuondError("CONNECTION_LOST", "lost on the way")

    run.end = fail  # type: ignore[method-assign, assignment]


def parallel(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """DistributedDataParallel: each process has the whole model and the mean of all gradients, and sends its part of that."""
    module = Whole()
    options = {} if given["found"] else {"process_group": dist.group.WORLD}
    muon = whole_optimizer(module, given["url"], given["run"], **options)
    # After the optimizer, as Accelerate has it.
    ddp = torch.nn.parallel.DistributedDataParallel(module)
    first, stop = given["steps"]
    share = float(world_size) if rank == 0 else 0.0
    digests = train(ddp, muon, range(first, stop - 1), share=share)
    run = muon.run
    assert run.members == dict.fromkeys(range(world_size), True)
    assert run.transport == "shm"
    sent = sum(parameter.gradient_bytes for parameter in run.parameters)
    state = muon.state_dict()
    if rank == 1:
        fail_once(run)
        with pytest.raises(MuondError, match="lost on the way"):
            train(ddp, muon, range(stop - 1, stop), share=share)
        # The others wait for this one to take the step again.
        digests.append((stop - 1, muon.step().digest))
    else:
        digests += train(ddp, muon, range(stop - 1, stop), share=share)
    torch.save((digests, whole(module), state, sent), folder / f"parallel-{world_size}-{rank}.pt")
    muon.close()


def first_alone(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """One rank has the optimizer: it says so, or is told that the others have none."""
    parts.MEETING_SECONDS = 1
    module = Whole()
    ddp = torch.nn.parallel.DistributedDataParallel(module)
    backward(ddp, 1)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"whose ranks \[1\] have taken no step.*process_group=False"):
            whole_optimizer(module, given["url"], f"{given['run']}-told").step()
        alone = whole_optimizer(module, given["url"], given["run"], process_group=False)
        assert alone.step().step == 1
        assert alone.run.members == {}
        alone.close()
    dist.barrier()


def differing(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Each rank has an optimizer of other parameters, as ZeroRedundancyOptimizer makes it: each has a run of its own."""
    module = Whole()
    ddp = torch.nn.parallel.DistributedDataParallel(module)
    backward(ddp, 1)
    own = [module.wide.weight, module.narrow.weight][rank]
    muon = muond.torch.Muon([("w", own)], url=given["url"], run=f"{given['run']}-{rank}")
    assert muon.step().applied == 1
    assert muon.run.members == {}
    muon.close()
    dist.barrier()
