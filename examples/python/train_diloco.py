"""DiLoCo: four replicas train apart and meet every 30 steps, in the service, which has the outer optimizer.

    python examples/python/train_diloco.py              # some minutes on two cores

They begin with a model that was trained for some steps, as in the paper (arXiv 2311.08105): at the very beginning weights
move too fast to part. Beside it one process trains with the batches of all replicas in every step, on three seeds, as
data parallel training would: the same tokens, and 30 times the bytes. Then the same replicas send integers of four
bits, and at last one of them is killed in the middle of a round and comes back: the others do not wait for it. A table
and a figure say what became of the loss, and what travelled. A service is started for as long as this runs, unless
--url says where one is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import get_context

from figure import BLUE, GREY, ORANGE, VERMILION, Line, Panel, save_figure
from gpt import Gpt, Size, seeded_gpt
from muond import DiLoCo, MuondError
from muond.torch.settings import Dtype
from progress import progress
from schedule import rate_at
from service import ROOT, serving
from table import table
from text import even_windows, random_windows, read_corpus

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Way:
    """A way to train: what the replicas send, and whether the last one is killed in the middle of the run."""

    name: str
    colour: str
    dtype: Dtype = "float32"
    kill: bool = False


WAYS = (
    Way("DiLoCo, float32", BLUE),
    Way("DiLoCo, int4_block64", ORANGE, "int4_block64"),
    Way("DiLoCo, float32,\none replica killed and back", VERMILION, kill=True),
)


@dataclass(frozen=True)
class Trained:
    """Validation loss by inner steps, and the bytes that a replica has sent and received."""

    name: str
    colour: str
    losses: list[tuple[int, float]]
    sent: float
    received: float
    notes: str = ""


def main() -> None:
    arguments = parse_arguments()
    with serving(arguments.url) as url, tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.pt"
        first = train_synchronously(arguments, arguments.seed, start)
        others = [train_synchronously(arguments, arguments.seed + i) for i in range(1, arguments.seeds)]
        synchronous = [first, *others]
        diloco = [train_apart(way, arguments, url, start) for way in WAYS]
    print(f"\n{report(synchronous, diloco)}")
    if save_figure(arguments.out, panels(synchronous, diloco), "inner step"):
        print(f"\n{arguments.out}")


def train_synchronously(arguments: argparse.Namespace, seed: int, start: Path | None = None) -> Trained:
    """One process with the batches of all replicas in each step; ``start`` is where it leaves what the replicas begin with.

    Its bytes are those of float32 gradients and updates, from there on.
    """
    model, inner, scheduler = make_model(arguments, seed)
    losses: list[tuple[int, float]] = []
    with progress(f"synchronous, seed {seed}", arguments.steps) as show:
        for step in range(arguments.steps):
            if start is not None and step == arguments.pretrain:
                torch.save({"model": model.state_dict(), "inner": inner.state_dict()}, start)
            inner.zero_grad()
            batch = torch.cat([batch_of(arguments, seed, replica, step) for replica in range(arguments.replicas)])
            loss = model(batch)
            loss.backward()
            inner.step()
            scheduler.step()
            if (step + 1) % arguments.sync_every == 0:
                losses.append((step + 1, validation_loss(model, arguments)))
            show(step + 1, f"loss {loss.item():.3f}")
    size = 4 * sum(parameter.numel() for parameter in model.parameters()) * (arguments.steps - arguments.pretrain)
    return Trained(f"synchronous, seed {seed}", GREY, losses, size, size)


def train_apart(way: Way, arguments: argparse.Namespace, url: str, begin: Path) -> Trained:
    """All replicas as processes, and the one that was killed once more."""
    before = counted(url)
    run = f"train-diloco-{os.getpid()}-{WAYS.index(way)}"
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # All replicas are there before one begins, so that no quorum closes a round without one that has not come yet.
        given = (way, arguments, url, run, folder, begin, spawn.Barrier(arguments.replicas))
        processes = [
            spawn.Process(target=replica_main, args=(replica, *given)) for replica in range(arguments.replicas)
        ]
        for process in processes:
            process.start()
        if way.kill:
            processes[-1].join()
            assert processes[-1].exitcode == -signal.SIGKILL, "the last replica ends itself in the middle of the run"
            processes[-1] = spawn.Process(target=replica_main, args=(arguments.replicas - 1, *given[:-1], None))
            processes[-1].start()
        for process in processes:
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"a replica of '{way.name}' ended with {process.exitcode}")
        losses, contributed = json.loads((Path(folder) / "found.json").read_text())
    notes = f"in {contributed} of {rounds_of(arguments)} rounds"
    sent, received = ((after - at) / arguments.replicas for after, at in zip(counted(url), before, strict=True))
    return Trained(way.name.replace("\n", " "), way.colour, losses, sent, received, notes)


def replica_main(
    replica: int,
    way: Way,
    arguments: argparse.Namespace,
    url: str,
    run: str,
    folder: str,
    begin: Path,
    start: Any | None,
) -> None:
    """The training of one replica, which ends when the run has had all its rounds. Without ``start`` it is one that comes back."""
    model, inner, _ = make_model(arguments, arguments.seed)
    last, newest = arguments.replicas - 1, Path(folder) / "newest.pt"
    begun = torch.load(begin, weights_only=True)
    model.load_state_dict(begun["model"])
    inner.load_state_dict(begun["inner"])
    losses: list[tuple[int, float]] = []
    contributed = 0
    bar = progress(way.name.replace("\n", " "), arguments.steps) if replica == 0 else nullcontext(lambda *_: None)
    with (
        make_optimizer(model, inner, replica, way, arguments, url, run, takeover=start is None) as optimizer,
        bar as show,
    ):
        rounds = optimizer.outer.open()
        if start is None:
            rejoin(optimizer, newest)
        else:
            start.wait()
        power_fails = arguments.pretrain + arguments.sync_every + 1
        while rounds.step_count < rounds_of(arguments):
            step = arguments.pretrain + rounds.step_count * arguments.sync_every + optimizer.inner_steps
            if way.kill and start is not None and replica == last and step == power_fails:
                # As a machine that loses power.
                os.kill(os.getpid(), signal.SIGKILL)
            for group in inner.param_groups:
                group["lr"] = arguments.lr * rate_at(step, arguments.steps)
            optimizer.zero_grad()
            loss = model(batch_of(arguments, arguments.seed, replica, step))
            loss.backward()
            optimizer.step()
            show(step + 1, f"loss {loss.item():.3f}")
            if optimizer.inner_steps == 0 and replica == 0:
                receipt = optimizer.receipt
                assert receipt is not None, "a round is over"
                contributed += any(one["replica"] == last for one in receipt.contributors)
                losses.append((step + 1, validation_loss(model, arguments)))
                keep(optimizer, newest)
    if replica == 0:
        (Path(folder) / "found.json").write_text(json.dumps([losses, contributed]))


def make_optimizer(
    model: Gpt,
    inner: torch.optim.Optimizer,
    replica: int,
    way: Way,
    arguments: argparse.Namespace,
    url: str,
    run: str,
    *,
    takeover: bool,
) -> DiLoCo:
    """Where one is killed the others go on without it; else all wait for all."""
    return DiLoCo(
        model,
        inner,
        arguments.sync_every,
        replica=replica,
        replicas=arguments.replicas,
        min_replicas=arguments.replicas - 1 if way.kill else None,
        deadline_seconds=120.0,
        url=url,
        run=run,
        gradient_dtype=way.dtype,
        update_dtype=way.dtype,
        takeover=takeover,
    )


def keep(optimizer: DiLoCo, path: Path) -> None:
    """Writes what a replica that comes back begins with, in one rename."""
    part = path.with_suffix(".part")
    torch.save(optimizer.state_dict(), part)
    part.rename(path)


def rejoin(optimizer: DiLoCo, path: Path) -> None:
    """Takes the weights of the newest round; where the others have just gone on, once more."""
    while True:
        try:
            optimizer.rejoin(torch.load(path, weights_only=True))
        except MuondError as error:
            if error.code != "STEP_CONFLICT":
                raise
            optimizer.outer.open().reopen()
        else:
            return


Inner = tuple[Gpt, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def make_model(arguments: argparse.Namespace, seed: int) -> Inner:
    torch.set_num_threads(1)
    model = seeded_gpt(Size(arguments.width, arguments.depth, arguments.heads, arguments.context), seed)
    inner = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
    return model, inner, torch.optim.lr_scheduler.LambdaLR(inner, lambda step: rate_at(step, arguments.steps))


def rounds_of(arguments: argparse.Namespace) -> int:
    return int((arguments.steps - arguments.pretrain) // arguments.sync_every)


def batch_of(arguments: argparse.Namespace, seed: int, replica: int, step: int) -> torch.Tensor:
    """The same whenever it is asked for, so that a replica that comes back reads on."""
    generator = torch.Generator().manual_seed((seed * 1000 + replica) * 1_000_000 + step)
    return random_windows(read_corpus_once().train, arguments.batch, arguments.context + 1, generator)


@torch.no_grad()
def validation_loss(model: Gpt, arguments: argparse.Namespace) -> float:
    return float(model(even_windows(read_corpus_once().validation, 256, arguments.context + 1)))


def read_corpus_once() -> Any:
    if not _corpus:
        _corpus.append(read_corpus(ROOT))
    return _corpus[0]


_corpus: list[Any] = []


def counted(url: str) -> tuple[float, float]:
    """The bytes of gradients that the service has received so far, and of updates that it has sent."""
    with urllib.request.urlopen(f"{url.replace('ws', 'http', 1).split('/v1')[0]}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("muond_") and "{" not in line)
    return float(values["muond_received_bytes_total"]), float(values["muond_sent_bytes_total"])


def report(synchronous: Sequence[Trained], diloco: Sequence[Trained]) -> str:
    header = (
        "trained",
        "last validation loss",
        "sent, MiB",
        "received, MiB",
        "share of synchronous",
        "the last replica",
    )
    whole = synchronous[0].sent
    rows = [
        (
            one.name,
            f"{one.losses[-1][1]:.4f}",
            f"{one.sent / MEBIBYTE:.2f}",
            f"{one.received / MEBIBYTE:.2f}",
            f"1/{whole / one.sent:.0f}",
            one.notes,
        )
        for one in (*synchronous, *diloco)
    ]
    lasts = [one.losses[-1][1] for one in synchronous]
    return (
        f"{table([header, *rows])}\nLosses in nats per byte. Bytes are of one replica; DiLoCo's are what the service has counted, "
        f"those of\nthe synchronous runs float32 in every step. Synchronous: {min(lasts):.4f} to {max(lasts):.4f} over the seeds."
    )


def panels(synchronous: Sequence[Trained], diloco: Sequence[Trained]) -> list[Panel]:
    everyone = (*synchronous, *diloco)
    losses = [Line(one.name, one.colour, one.losses, dashed=one.colour == VERMILION) for one in everyone]
    rounds = [step for step, _ in diloco[0].losses]
    travelled = [
        Line(
            one.name, one.colour, [(step, one.sent / MEBIBYTE * (i + 1) / len(rounds)) for i, step in enumerate(rounds)]
        )
        for one in (synchronous[0], *diloco[:2])
    ]
    return [
        Panel(
            "Four replicas that meet every 30 steps, and one process with all their batches", "validation loss", losses
        ),
        Panel("Gradient bytes that a replica has sent", "MiB", travelled, logarithmic=True, share=0.6),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--replicas", type=int, default=4, help="processes (4)")
    add("--sync-every", type=int, default=30, help="inner steps of a round (30)")
    add("--pretrain", type=int, default=300, help="synchronous steps before the replicas part (300)")
    add("--width", type=int, default=64, help="of the residual stream (64)")
    add("--depth", type=int, default=2, help="layers (2)")
    add("--heads", type=int, default=4, help="of each attention (4)")
    add("--context", type=int, default=64, help="bytes read at a time (64)")
    add("--batch", type=int, default=8, help="windows of a replica's step (8)")
    add("--steps", type=int, default=600, help="inner steps (600)")
    add("--lr", type=float, default=4e-3, help="the inner AdamW's, at its highest (4e-3)")
    add("--seeds", type=int, default=3, help="of the synchronous runs (3)")
    add("--seed", type=int, default=1, help="of the weights and the batches (1)")
    add("--url", help="a service that runs; default: one is started for as long as this runs")
    add("--out", type=Path, default=Path("train_diloco.png"), help="the figure (train_diloco.png)")
    arguments = parser.parse_args()
    apart = arguments.steps - arguments.pretrain
    if apart <= 0 or apart % arguments.sync_every:
        parser.error(f"--steps less --pretrain are {apart}, expected a multiple of --sync-every {arguments.sync_every}")
    if arguments.replicas < 2:
        parser.error(f"--replicas is {arguments.replicas}, at least 2")
    return arguments


if __name__ == "__main__":
    main()
