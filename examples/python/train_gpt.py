"""Trains a byte-level GPT on this repository's own text, with torch's optimizers and with a service, and compares them.

    python examples/python/train_gpt.py                                       # all four, about two minutes on two cores
    python examples/python/train_gpt.py --optimizer local-muon muond-muon --width 256 --depth 6 --steps 1000

Every optimizer gets the same start and the same batches. A service is started for as long as this runs, unless --url
says where one is. Needs torch, muond, and for the figure matplotlib.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from figure import BLUE, GREEN, ORANGE, VERMILION, Line, Panel, save_figure
from gpt import Gpt, Size, seeded_gpt
from progress import progress
from recipes import NAMES, Rates, Wanted, close, make_optimizers, watched
from schedule import WARM_UP, rate_at
from service import ROOT, serving
from table import table
from text import Corpus, even_windows, random_windows, read_corpus

COLOURS = dict(zip(NAMES, (ORANGE, VERMILION, BLUE, GREEN), strict=True))
EVALUATIONS = 20
EVALUATED_WINDOWS = 64


@dataclass
class Outcome:
    """Losses in nats per byte; ``logits``: the largest of all heads in each step; ``seconds``: without evaluations."""

    name: str
    train: list[float] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    clipped_heads: int = 0
    seconds: float = 0.0
    optimizer_seconds: float = 0.0


def main() -> None:
    arguments = parse_arguments()
    # Half of the cores are the service's: torch's threads spin while they wait, and would delay the service's steps.
    torch.set_num_threads(arguments.threads or max(1, (os.cpu_count() or 2) // 2))
    size = Size(arguments.width, arguments.depth, arguments.heads, arguments.context)
    corpus = read_corpus(ROOT)
    parameters = sum(parameter.numel() for parameter in Gpt(size).parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {len(corpus.train) / 1e6:.2f} MB of text from {corpus.files} files, "
        f"{arguments.steps} steps of {arguments.batch} x {arguments.context} bytes, seed {arguments.seed}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    remote = any(name.startswith("muond") for name in arguments.optimizer)
    if remote:
        with serving(arguments.url) as url:
            outcomes = [train(name, arguments, size, corpus, {"url": url}) for name in arguments.optimizer]
    else:
        outcomes = [train(name, arguments, size, corpus, {}) for name in arguments.optimizer]
    print(f"\n{report(outcomes)}")
    if save_figure(arguments.out, panels(outcomes, arguments.threshold)):
        print(f"\n{arguments.out}")


def train(name: str, arguments: argparse.Namespace, size: Size, corpus: Corpus, options: dict[str, Any]) -> Outcome:
    device = torch.device(arguments.device)
    model = seeded_gpt(size, arguments.seed).to(device)
    max_logits = watched(model)
    rates = Rates(arguments.muon_lr, arguments.muonclip_lr, arguments.adamw_lr)
    optimizers = make_optimizers(model, Wanted(name, rates, arguments.threshold, options), max_logits)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: rate_at(step, arguments.steps)) for one in optimizers
    ]
    generator = torch.Generator().manual_seed(arguments.seed)
    validation = even_windows(corpus.validation, EVALUATED_WINDOWS, size.context + 1).to(device)
    outcome = Outcome(name, validation=[(0, evaluate(model, validation))])
    with progress(f"{name:<14}", arguments.steps) as show:
        for step in range(1, arguments.steps + 1):
            batch = random_windows(corpus.train, arguments.batch, size.context + 1, generator).to(device)
            started = time.perf_counter()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            outcome.train.append(loss.item())
            outcome.logits.append(max(max(heads) for heads in max_logits.values().values()))
            computed = time.perf_counter()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                receipt = optimizer.step()
                schedule.step()
                # torch's own optimizers return nothing.
                outcome.clipped_heads += 0 if receipt is None else sum(receipt.clipped_heads.values())
            # The service's optimizers have reset it already.
            max_logits.reset(step)
            outcome.optimizer_seconds += time.perf_counter() - computed
            outcome.seconds += time.perf_counter() - started
            if step * EVALUATIONS // arguments.steps > (step - 1) * EVALUATIONS // arguments.steps:
                outcome.validation.append((step, evaluate(model, validation)))
            show(step, f"loss {outcome.train[-1]:.3f}, validation {outcome.validation[-1][1]:.3f}")
    close(optimizers)
    return outcome


@torch.no_grad()
def evaluate(model: Gpt, validation: torch.Tensor) -> float:
    return float(model(validation))


def report(outcomes: Sequence[Outcome]) -> str:
    header = (
        "optimizer",
        "validation loss",
        "largest logit",
        "heads clipped",
        "ms per step",
        "of it optimizer",
        "from local-muon",
    )
    reference = next((outcome for outcome in outcomes if outcome.name == "local-muon"), None)
    rows = [
        (
            outcome.name,
            f"{outcome.validation[-1][1]:.4f}",
            f"{max(outcome.logits):.1f}",
            str(outcome.clipped_heads) if outcome.name == "muond-muonclip" else "-",
            f"{1000 * outcome.seconds / len(outcome.train):.1f}",
            f"{1000 * outcome.optimizer_seconds / len(outcome.train):.1f}",
            f"{furthest(outcome, reference):.3%}" if reference and outcome.name == "muond-muon" else "-",
        )
        for outcome in outcomes
    ]
    explained = "Losses in nats per byte; `from local-muon` is the largest relative difference of a training loss after warm-up."
    return f"{table([header, *rows])}\n{explained}"


def difference(outcome: Outcome, reference: Outcome) -> list[float]:
    return [abs(a - b) / b for a, b in zip(outcome.train, reference.train, strict=True)]


def furthest(outcome: Outcome, reference: Outcome) -> float:
    return max(difference(outcome, reference)[int(WARM_UP * len(outcome.train)) :])


def panels(outcomes: Sequence[Outcome], threshold: float) -> list[Panel]:
    by_name = {outcome.name: outcome for outcome in outcomes}
    losses = [
        Line(outcome.name, COLOURS[outcome.name], outcome.validation, dashed=outcome.name == "muond-muon")
        for outcome in outcomes
    ]
    logits = [
        Line(
            outcome.name, COLOURS[outcome.name], list(enumerate(outcome.logits, 1)), dashed=outcome.name == "muond-muon"
        )
        for outcome in outcomes
    ]
    mark = (threshold, f"threshold of QK-clip, {threshold:g}") if "muond-muonclip" in by_name else None
    drawn = [Panel("Byte-level GPT on this repository's text", "validation loss, nats per byte", losses)]
    if {"local-muon", "muond-muon"} <= by_name.keys():
        apart = difference(by_name["muond-muon"], by_name["local-muon"])
        # A logarithmic axis has no place for 0, which is what the first step shows.
        points = [(step, 100 * max(value, 1e-8)) for step, value in enumerate(apart, 1)]
        title = "The same Muon here and in the service"
        drawn.append(
            Panel(
                title,
                "difference of the loss, %",
                [Line("|muond-muon - local-muon|\n/ local-muon", BLUE, points)],
                True,
                (1.0, "1 %"),
                0.55,
            )
        )
    drawn.append(Panel("Largest attention logit of all heads", "logit", logits, mark=mark, share=0.75))
    return drawn


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--optimizer",
        nargs="+",
        choices=NAMES,
        default=list(NAMES),
        metavar="NAME",
        help=f"any of {', '.join(NAMES)}; default: all",
    )
    add("--width", type=int, default=96, help="of the residual stream (96)")
    add("--depth", type=int, default=3, help="layers (3)")
    add("--heads", type=int, default=4, help="of each attention (4)")
    add("--context", type=int, default=64, help="bytes read at a time (64)")
    add("--batch", type=int, default=16, help="windows of a step (16)")
    add("--steps", type=int, default=250, help="(250)")
    add("--seed", type=int, default=1, help="of the weights and the batches (1)")
    add("--muon-lr", type=float, default=0.02, help="of Muon's matrices (0.02)")
    add("--muonclip-lr", type=float, default=0.01, help="of MuonClip's matrices, whose updates have AdamW's RMS (0.01)")
    add("--adamw-lr", type=float, default=3e-3, help="of what AdamW trains (0.003)")
    add(
        "--threshold",
        type=float,
        default=8.0,
        help="QK-clip's largest logit (8; Kimi K2 had 100, which so small a model does not reach)",
    )
    add("--device", default="cpu", help="where the model is (cpu)")
    add("--threads", type=int, help="of torch (half of the cores)")
    add("--url", help="a service that runs; default: one is started for as long as this runs")
    add("--out", type=Path, default=Path("train_gpt.png"), help="the figure (train_gpt.png)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
