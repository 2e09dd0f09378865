"""A model that FSDP2 shards over processes, each of which sends and receives its own part of every matrix.

    python examples/python/train_fsdp.py                # four processes on this machine; a GPU each where there are as many
    torchrun --nproc-per-node 8 examples/python/train_fsdp.py --url ws://HOST:8787

The loop is that of a trainer of large models: build, shard, optimizer, scheduler, clip, step. Nothing in it is about the
service but the line that makes the optimizer: Muon sees whole matrices there, and no rank gathers one. A table shows what
each rank has sent; all of them together send each gradient once. A service is started for as long as this runs, unless
--url says where one is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.optim.lr_scheduler import LambdaLR

from figure import BLUE, Line, Panel, save_figure
from gpt import Gpt, Size, seeded_gpt
from muond.torch import Optimizer, suggest
from progress import progress
from schedule import rate_at
from service import ROOT, serving
from table import table
from text import random_windows, read_corpus


def main() -> None:
    arguments = parse_arguments()
    if "RANK" in os.environ:
        # torchrun has started this process as one of the ranks.
        train(arguments, arguments.url)
        return
    with serving(arguments.url) as url, tempfile.TemporaryDirectory() as folder:
        spawn(rank_main, (arguments, url, folder), nprocs=arguments.ranks)


def rank_main(rank: int, arguments: argparse.Namespace, url: str, folder: str) -> None:
    """One of the processes that this program has started, as torchrun would."""
    backend = backend_of(arguments.ranks)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks)
    os.environ["LOCAL_RANK"] = str(rank)
    train(arguments, url)


def train(arguments: argparse.Namespace, url: str | None) -> None:
    """The training of one rank."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group(backend_of(int(os.environ["LOCAL_WORLD_SIZE"])))
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world_size,))
    model = seeded_gpt(Size(arguments.width, arguments.depth, arguments.heads, arguments.context), arguments.seed)
    model.to(device)
    for block in model.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
    losses: list[float] = []
    with (
        Optimizer(model.named_parameters(), groups, url=url) as optimizer,
        progress(f"{world_size} ranks", arguments.steps) if rank == 0 else nullcontext(lambda *_: None) as show,
    ):
        scheduler = LambdaLR(optimizer, lambda step: rate_at(step, arguments.steps))
        for step, batch in enumerate(batches(arguments, rank, world_size), 1):
            optimizer.zero_grad()
            loss = model(batch.to(device))
            # FSDP reduces the gradients while it runs: each rank has the mean of its own shard.
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.clip)
            optimizer.step()
            scheduler.step()
            dist.all_reduce(mean := loss.detach() / world_size)
            losses.append(mean.item())
            show(step, f"loss {losses[-1]:.3f}")
        shares: list[tuple[int, str]] = [(0, "")] * world_size
        dist.all_gather_object(shares, (elements_here(model), optimizer.run.digest))
        if rank == 0:
            finish(arguments, model, losses, shares)
    dist.destroy_process_group()


def backend_of(processes: int) -> str:
    return "nccl" if torch.cuda.device_count() >= processes else "gloo"


def batches(arguments: argparse.Namespace, rank: int, world_size: int) -> Iterator[torch.Tensor]:
    """This rank's part of the batch of each step; the whole of a batch does not depend on the number of ranks."""
    text = read_corpus(ROOT).train
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.steps):
        yield random_windows(text, arguments.batch, arguments.context + 1, generator).chunk(world_size)[rank]


def elements_here(model: Gpt) -> int:
    """The weights that lie on this rank: as many elements as it sends of gradients, and receives of updates."""
    return sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]


def finish(arguments: argparse.Namespace, model: Gpt, losses: list[float], shares: list[tuple[int, str]]) -> None:
    whole = sum(parameter.numel() for parameter in model.parameters())
    header = ("rank", "weights here", "share of the model", "digest of the run")
    rows = [
        (f"rank {rank}", f"{elements}", f"{elements / whole:.1%}", digest[:16])
        for rank, (elements, digest) in enumerate(shares)
    ]
    assert sum(elements for elements, _ in shares) == whole, "each weight lies on one rank"
    print(f"\n{table([header, *rows])}\nLast loss {losses[-1]:.4f} nats per byte.")
    line = Line(f"{len(shares)} ranks", BLUE, list(enumerate(losses, 1)))
    if save_figure(arguments.out, [Panel("Muon on shards of FSDP2", "loss, nats per byte", [line])]):
        print(f"\n{arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="processes, unless torchrun starts them (4)")
    add("--width", type=int, default=64, help="of the residual stream (64)")
    add("--depth", type=int, default=2, help="layers (2)")
    add("--heads", type=int, default=4, help="of each attention (4)")
    add("--context", type=int, default=64, help="bytes read at a time (64)")
    add("--batch", type=int, default=16, help="windows of a step, over all ranks (16)")
    add("--steps", type=int, default=100, help="(100)")
    add("--clip", type=float, default=1.0, help="largest norm of all gradients together (1)")
    add("--seed", type=int, default=1, help="of the weights and the batches (1)")
    add("--url", help="a service that runs; default: one is started for as long as this runs")
    add("--out", type=Path, default=Path("train_fsdp.png"), help="the figure (train_fsdp.png)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
