"""Data parallel training: one run, of which every rank sends its part of the gradients.

DDP averages the gradients. Each rank sends its part of them to the service and applies its part of the updates; then all
have all weights.

    python examples/python/train_ddp.py                 # two processes on this machine, about a minute on two cores

At the end it shows that all ranks have the same weights, bit for bit, and trains the same in one process: with the
batches of the ranks accumulated, which must give the same bits, and with one batch of the same size, which adds in
another order. It exits with 1 if not. A service is started for as long as this runs, unless --url says where one is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from figure import BLUE, GREEN, ORANGE, Line, Panel, save_figure
from gpt import Gpt, Size, seeded_gpt
from muond.torch import Optimizer, suggest
from progress import progress
from service import ROOT, serving
from table import table
from text import random_windows, read_corpus
from weights import digest

# How far sums of float32 in another order may take the loss.
LOSS_BOUND = 1e-4


@dataclass(frozen=True)
class Trained:
    """The result of a rank or a process: losses of the whole batch, and SHA-256 of the weights."""

    name: str
    losses: list[float]
    weights: str
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    with serving(arguments.url) as url, tempfile.TemporaryDirectory() as folder:
        spawned = (arguments, url, folder)
        spawn(rank_main, spawned, nprocs=arguments.ranks)
        ranks = [Trained(**json.loads((Path(folder) / f"{rank}.json").read_text())) for rank in range(arguments.ranks)]
        accumulated = train_alone("one process, accumulating", arguments, url, arguments.ranks)
        whole = train_alone("one process, whole batch", arguments, url, 1)
    print(f"\n{report([*ranks, accumulated, whole])}")
    if save_figure(arguments.out, panels(ranks[0], accumulated, whole)):
        print(f"\n{arguments.out}")
    failures = check(ranks, accumulated, whole)
    for failure in failures:
        print(f"FAILED: {failure}")
    raise SystemExit(1 if failures else 0)


def rank_main(rank: int, arguments: argparse.Namespace, url: str, folder: str) -> None:
    """The training of one process."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.ranks)
    model = make_model(arguments)
    parallel = DistributedDataParallel(model)
    optimizer = make_optimizer(model, url)
    losses = []
    started = time.perf_counter()
    with progress(f"{arguments.ranks} ranks", arguments.steps if rank == 0 else 0) as show:
        for step, batches in enumerate(split_batches(arguments, arguments.ranks), 1):
            optimizer.zero_grad()
            loss = parallel(batches[rank])
            # DDP takes the mean of the ranks' gradients while it runs.
            loss.backward()
            optimizer.step()
            dist.all_reduce(mean := loss.detach() / arguments.ranks)
            losses.append(mean.item())
            if rank == 0:
                show(step, f"loss {losses[-1]:.3f}")
    seconds = time.perf_counter() - started
    optimizer.close(delete=True)
    trained = Trained(f"rank {rank} of {arguments.ranks}", losses, digest(model), seconds)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(asdict(trained)))
    dist.destroy_process_group()


def train_alone(name: str, arguments: argparse.Namespace, url: str, parts: int) -> Trained:
    """The same training in this process, each batch in so many parts."""
    torch.set_num_threads(1)
    model = make_model(arguments)
    losses = []
    started = time.perf_counter()
    with make_optimizer(model, url) as optimizer, progress(name, arguments.steps) as show:
        for step, batches in enumerate(split_batches(arguments, parts), 1):
            optimizer.zero_grad()
            loss = torch.zeros(())
            for batch in batches:
                part = model(batch) / parts
                part.backward()
                loss += part.detach()
            optimizer.step()
            losses.append(loss.item())
            show(step, f"loss {losses[-1]:.3f}")
    return Trained(name, losses, digest(model), time.perf_counter() - started)


def make_model(arguments: argparse.Namespace) -> Gpt:
    return seeded_gpt(Size(arguments.width, arguments.depth, arguments.heads, arguments.context), arguments.seed)


def make_optimizer(model: Gpt, url: str) -> Optimizer:
    """Gradients and updates travel as float32, so that nothing but the order of sums can make a difference."""
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
    return Optimizer(model.named_parameters(), groups, url=url, gradient_dtype="float32", update_dtype="float32")


def split_batches(arguments: argparse.Namespace, parts: int) -> Iterator[Sequence[torch.Tensor]]:
    """The batches of all steps, each cut into equal parts; the whole of a batch does not depend on ``parts``."""
    text = read_corpus(ROOT).train
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.steps):
        yield random_windows(text, arguments.batch, arguments.context + 1, generator).chunk(parts)


def furthest(one: Trained, other: Trained) -> float:
    return max(abs(a - b) / b for a, b in zip(one.losses, other.losses, strict=True))


def check(ranks: Sequence[Trained], accumulated: Trained, whole: Trained) -> list[str]:
    failures = [
        f"{rank.name} has other weights than {ranks[0].name}" for rank in ranks if rank.weights != ranks[0].weights
    ]
    if accumulated.weights != ranks[0].weights:
        failures.append(f"{accumulated.name}: other weights than {ranks[0].name}")
    if furthest(ranks[0], whole) > LOSS_BOUND:
        failures.append(f"{whole.name}: a loss differs by {furthest(ranks[0], whole):.2e}, at most {LOSS_BOUND:.0e}")
    return failures


def report(trained: Sequence[Trained]) -> str:
    header = ("trained by", "last loss", "ms per step", "largest loss difference", "SHA-256 of the weights")
    rows = [
        (
            one.name,
            f"{one.losses[-1]:.6f}",
            f"{1000 * one.seconds / len(one.losses):.1f}",
            f"{furthest(one, trained[0]):.1e}",
            one.weights[:16],
        )
        for one in trained
    ]
    return f"{table([header, *rows])}\nLosses in nats per byte; differences are relative to rank 0."


def panels(ranks: Trained, accumulated: Trained, whole: Trained) -> list[Panel]:
    losses = [
        Line(one.name, colour, list(enumerate(one.losses, 1)), dashed)
        for one, colour, dashed in ((ranks, ORANGE, False), (whole, GREEN, True))
    ]
    apart = [
        Line(f"{one.name},\nfrom the ranks", colour, [(step, max(abs(a - b) / b, 1e-9)) for step, (a, b) in pairs])
        for one, colour in ((accumulated, BLUE), (whole, GREEN))
        for pairs in [list(enumerate(zip(one.losses, ranks.losses, strict=True), 1))]
    ]
    mark = (LOSS_BOUND, f"bound, {LOSS_BOUND:g}")
    return [
        Panel("Data parallel training through one service", "loss, nats per byte", losses),
        Panel("Difference (0 is drawn at 1e-9)", "relative", apart, logarithmic=True, mark=mark, share=0.6),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes (2)")
    add("--width", type=int, default=64, help="of the residual stream (64)")
    add("--depth", type=int, default=2, help="layers (2)")
    add("--heads", type=int, default=4, help="of each attention (4)")
    add("--context", type=int, default=64, help="bytes read at a time (64)")
    add("--batch", type=int, default=16, help="windows of a step, over all ranks (16)")
    add("--steps", type=int, default=100, help="(100)")
    add("--seed", type=int, default=1, help="of the weights and the batches (1)")
    add("--url", help="a service that runs; default: one is started for as long as this runs")
    add("--out", type=Path, default=Path("train_ddp.png"), help="the figure (train_ddp.png)")
    arguments = parser.parse_args()
    if arguments.batch % arguments.ranks:
        parser.error(f"--batch {arguments.batch} cannot be divided among --ranks {arguments.ranks}")
    return arguments


if __name__ == "__main__":
    main()
