"""Hugging Face's Trainer with a muond service: a GPT-2 of about a million parameters, on this repository's bytes.

    python examples/python/train_hf.py                       # about two minutes on two cores
    python examples/python/train_hf.py --resume              # goes on from the Trainer's newest checkpoint in --out

Trainer is given the optimizer and a scheduler, and nothing else of it is changed. The state of the optimizer stays in
the service, which keeps a checkpoint of it beside each of Trainer's: kill this with -9 at any time, and --resume goes
on as if nothing had happened. `--optimizer adamw` is torch's, for comparison; both are trained and drawn together
unless one is named. Nothing is downloaded. Needs transformers and accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from figure import BLUE, ORANGE, Line, Panel, save_figure
from muond.torch import Optimizer, suggest
from progress import progress
from schedule import rate_at
from service import ROOT, serving
from table import table
from text import even_windows, read_corpus
from weights import digest

NAMES = ("muond", "adamw")
COLOURS = {"muond": BLUE, "adamw": ORANGE}
BETAS = (0.9, 0.95)


class ByteTokenizer:
    """Every byte of UTF-8 is a token of its own."""

    vocabulary = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class Windows(Dataset[dict[str, torch.Tensor]]):
    """``count`` windows of the text, spread evenly; the model itself shifts the labels by one."""

    def __init__(self, text: torch.Tensor, count: int, context: int) -> None:
        self._windows = even_windows(text, count, context)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


class Progress(TrainerCallback):
    """Shows the latest losses; ``show`` takes the step and a note."""

    def __init__(self, show: Callable[[int, str], None]) -> None:
        self._show = show
        self._latest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._latest.update({key: given["logs"][key] for key in ("loss", "eval_loss") if key in given["logs"]})
        self._show(state.global_step, ", ".join(f"{key} {value:.3f}" for key, value in self._latest.items()))


@dataclass(frozen=True)
class Outcome:
    """``history`` is the Trainer's: maps with ``step`` and ``loss`` or ``eval_loss``."""

    name: str
    history: list[dict[str, Any]]
    seconds: float
    weights: str
    sample: str

    def points(self, key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in self.history if key in entry]


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads or max(1, (os.cpu_count() or 2) // 2))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = make_model(arguments)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {arguments.steps} steps, seed {arguments.seed}"
    )
    outcomes = []
    # The optimizer's state is kept beside Trainer's checkpoints, so that it outlives this process.
    remote = "muond" in arguments.optimizer
    with serving(arguments.url, arguments.out / "service") if remote else nullcontext("") as url:
        for name in arguments.optimizer:
            outcomes.append(train(name, arguments, url))
    record = [{"name": one.name, "weights": one.weights, "history": one.history} for one in outcomes]
    (arguments.out / "losses.json").write_text(json.dumps(record))
    print(f"\n{report(outcomes)}")
    if save_figure(arguments.out / "train_hf.png", panels(outcomes)):
        print(f"\n{arguments.out / 'train_hf.png'}")


def train(name: str, arguments: argparse.Namespace, url: str) -> Outcome:
    set_seed(arguments.seed)
    model = make_model(arguments)
    optimizer = make_optimizer(name, model, arguments, url)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, arguments.steps))
    corpus = read_corpus(ROOT)
    out = arguments.out / name
    trainer = Trainer(
        model,
        training_arguments(arguments, out),
        train_dataset=Windows(corpus.train, arguments.windows, arguments.context),
        eval_dataset=Windows(corpus.validation, 64, arguments.context),
        optimizers=(optimizer, scheduler),
    )
    # Trainer would print a line for every step.
    trainer.remove_callback(PrinterCallback)
    newest = get_last_checkpoint(str(out)) if arguments.resume and out.exists() else None
    started = time.perf_counter()
    with progress(name, arguments.steps) as show:
        trainer.add_callback(Progress(show))
        trainer.train(resume_from_checkpoint=newest)
    seconds = time.perf_counter() - started
    if isinstance(optimizer, Optimizer):
        # The run stays, so that --resume can go on from the last checkpoint.
        optimizer.close()
    return Outcome(name, trainer.state.log_history, seconds, digest(model), sample(model))


def make_model(arguments: argparse.Namespace) -> GPT2LMHeadModel:
    set_seed(arguments.seed)
    config = GPT2Config(
        vocab_size=ByteTokenizer.vocabulary,
        n_positions=arguments.context,
        n_embd=arguments.width,
        n_layer=arguments.depth,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def make_optimizer(name: str, model: GPT2LMHeadModel, arguments: argparse.Namespace, url: str) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=BETAS)
    # GPT-2 keeps its matrices transposed: a learning rate that looks at the larger side only is the same for both.
    muon = {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    groups = suggest(model, muon=muon, adamw={"lr": 3e-3, "betas": BETAS}, quiet=True)
    # takeover: a trainer that was killed may still be connected in the eyes of the service.
    options: dict[str, Any] = {"state": "checkpoint", "takeover": True}
    return Optimizer(model.named_parameters(), groups, url=url, **options)


def training_arguments(arguments: argparse.Namespace, out: Path) -> TrainingArguments:
    return TrainingArguments(
        str(out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=64,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_strategy="steps",
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 10),
        save_steps=arguments.save_steps,
        save_total_limit=3,
        seed=arguments.seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def sample(model: GPT2LMHeadModel, prompt: str = "export function ", count: int = 48) -> str:
    """The model's continuation of a text: always the likeliest next byte."""
    tokenizer = ByteTokenizer()
    tokens = torch.tensor([tokenizer.encode(prompt)])
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            logits = model(tokens[:, -model.config.n_positions :]).logits
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(tokens[0].tolist())


def report(outcomes: Sequence[Outcome]) -> str:
    rows = [
        (
            one.name,
            f"{one.points('eval_loss')[-1][1]:.4f}",
            f"{one.points('loss')[-1][1]:.4f}",
            f"{one.seconds:.1f}",
            one.weights[:16],
            repr(one.sample[16:]),
        )
        for one in outcomes
    ]
    header = (
        "optimizer",
        "validation loss",
        "last training loss",
        "seconds",
        "SHA-256 of the weights",
        "`export function ` goes on with",
    )
    return f"{table([header, *rows])}\nLosses in nats per byte."


def panels(outcomes: Sequence[Outcome]) -> list[Panel]:
    title = "GPT-2 in Hugging Face's Trainer, on this repository's bytes"
    validation = [Line(one.name, COLOURS[one.name], one.points("eval_loss")) for one in outcomes]
    training = [Line(one.name, COLOURS[one.name], one.points("loss")) for one in outcomes]
    return [
        Panel(title, "validation loss, nats per byte", validation, share=0.8),
        Panel("Training", "loss of the batch, nats per byte", training, share=0.8),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optimizer", nargs="+", choices=NAMES, default=list(NAMES), help="default: both")
    add("--width", type=int, default=128, help="of the residual stream (128)")
    add("--depth", type=int, default=5, help="layers (5)")
    add("--context", type=int, default=64, help="bytes read at a time (64)")
    add("--batch", type=int, default=16, help="windows of a step (16)")
    add("--windows", type=int, default=1600, help="windows of an epoch (1600)")
    add("--steps", type=int, default=200, help="(200)")
    add("--save-steps", type=int, default=50, help="between two checkpoints (50)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--seed", type=int, default=1, help="of the weights and the batches (1)")
    add("--threads", type=int, help="of torch (half of the cores)")
    add("--url", help="a service with a data folder; default: one is started for as long as this runs")
    add("--out", type=Path, default=Path("train_hf"), help="folder for checkpoints, losses and the figure (train_hf)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
