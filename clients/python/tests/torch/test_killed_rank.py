"""A rank that is killed in the middle of a step: the others hear of it, and the training goes on after a restart, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sharded
import torch
from processes import SECONDS, run_ranks, started

import muond
from muond.rest import Rest
from muond.steps.updates import Update
from muond.transport.address import endpoint
from service import Service

RANKS = 3
KEPT = 2
"""The step that weights and state are kept of; rank 1 is killed in the next one."""


def until_killed(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    module = sharded.model()
    sharded.shard(module)
    muon = sharded.optimizer(module, given["url"], given["run"], retries=0)
    sharded.train(module, muon, range(1, KEPT + 1), share=float(rank == 0))
    weights = sharded.whole(module)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
        muon.checkpoint("kept")
    run = muon.run
    if rank == 1:
        dies_after(run, 2)
    else:
        threading.Thread(target=tell_of_loss, args=(run, folder / f"lost-{rank}"), daemon=True).start()
    sharded.train(module, muon, range(KEPT + 1, KEPT + 2), share=float(rank == 0))


def dies_after(run: muond.Run, count: int) -> None:
    """Kills this process when it has sent so many gradients of a step and one of them was applied, of which it has more."""
    place = run.gradient_placed

    def some(indices: list[int], arenas: Any, ready: Any = None) -> None:
        assert len(indices) > count
        place(indices[:count], arenas, ready)
        assert isinstance(run._events.get(timeout=SECONDS), Update)
        os.kill(os.getpid(), signal.SIGKILL)

    run.gradient_placed = some  # type: ignore[method-assign, assignment]


def tell_of_loss(run: muond.Run, told: Path) -> None:
    """Writes a file when rank 1 is gone, and ends the process as its launcher would."""
    while run.members[1]:
        threading.Event().wait(0.02)
    told.write_text(json.dumps(sorted(run.members.items())))
    os._exit(7)


def after_restart(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    module = sharded.model()
    module.load_state_dict(torch.load(folder / "weights.pt"))
    sharded.shard(module)
    how = {"mode": "resume", "checkpoint": "kept", "takeover": True}
    muon = sharded.optimizer(module, given["url"], given["run"], **how)
    digests = sharded.train(module, muon, range(KEPT + 1, 6), share=float(rank == 0))
    weights = sharded.whole(module)
    muon.close()
    torch.save((digests, weights), folder / f"done-{rank}.pt")


def test_training_goes_on_after_a_rank_was_killed_in_a_step(
    durable: Callable[..., Service], name: str, tmp_path: Path
) -> None:
    service = durable()
    alone = sharded.model()
    with sharded.optimizer(alone, service.url, f"{name}-alone") as muon:
        expected = sharded.train(alone, muon, range(1, 6))
    given = {"url": service.url, "run": name}
    with started(RANKS, tmp_path, until_killed, given) as ranks:
        for rank in ranks:
            rank.join(SECONDS)
        assert [rank.exitcode for rank in ranks] == [7, -signal.SIGKILL, 7]
    for rank in (0, 2):
        assert [1, False] in json.loads((tmp_path / f"lost-{rank}").read_text())
    with Rest(endpoint(service.url)) as rest:
        found = rest.run(name)
        assert found["step"] == KEPT
        assert 0 < len(found["ahead"]) < len(list(alone.parameters())), "it was lost in the middle of a step"
    run_ranks(RANKS, tmp_path, after_restart, given)
    for rank in range(RANKS):
        digests, weights = torch.load(tmp_path / f"done-{rank}.pt")
        assert digests == expected[KEPT:]
        for key, tensor in sharded.whole(alone).items():
            assert torch.equal(weights[key].view(torch.int32), tensor.view(torch.int32)), key
