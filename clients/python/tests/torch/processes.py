"""Ranks of a trainer as processes: they are forked from one that has imported torch, so that each begins at once."""

from __future__ import annotations

import multiprocessing
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import sharded
import torch
import torch.distributed as dist

# Ranks that wait for each other for longer hang. A machine with other work needs some of it.
SECONDS = 120

_CONTEXT = multiprocessing.get_context("forkserver")
# The first model that is sharded imports the compiler.
_CONTEXT.set_forkserver_preload(
    [
        *("pytest", "transformers.trainer", "torch._dynamo"),
        *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "muond.torch"),
    ]
)


@contextmanager
def started(world_size: int, folder: Path, work: Callable[..., None], *given: Any) -> Iterator[list[ForkServerProcess]]:
    """Runs ``work(rank, world_size, folder, *given)`` in so many processes, which are killed at the end if they still run."""
    meeting = folder / f"meeting-{secrets.token_hex(4)}"
    ranks = [
        _CONTEXT.Process(target=_enter, args=(rank, world_size, folder, meeting, work, given), daemon=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(SECONDS)


def run_ranks(world_size: int, folder: Path, work: Callable[..., None], *given: Any) -> None:
    """Runs ``work`` to its end on every rank. A rank that fails shows what it wrote."""
    with started(world_size, folder, work, *given) as ranks:
        for rank in ranks:
            rank.join(SECONDS)
        written = [_log(folder, rank) for rank in range(world_size)]
        assert [rank.exitcode for rank in ranks] == [0] * world_size, "\n".join(written)


def _log(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank}.log").read_text()


def _enter(
    rank: int, world_size: int, folder: Path, meeting: Path, work: Callable[..., None], given: tuple[Any, ...]
) -> None:
    sys.stdout = sys.stderr = (folder / f"rank-{rank}.log").open("w", buffering=1)
    # More of them would wait for each other's cores.
    torch.set_num_threads(1)
    sharded.join(rank, world_size, meeting)
    work(rank, world_size, folder, *given)
    dist.destroy_process_group()
