"""Says how far training through a service is from torch's own optimizers, and exits with 1 if that is too far.

    python examples/python/parity.py                # 200 steps of each variation, three to four minutes on two cores

Same start, same batches. `as it is` sends gradients and takes updates in bfloat16, which is the default; `rounding
alone` is torch's optimizer, whose gradients were rounded to bfloat16 and nothing else; `float32` sends and takes
float32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import muond.torch
from gpt import Gpt, Size, seeded_gpt
from muond.torch import suggest
from progress import progress
from schedule import rate_at
from service import ROOT, serving
from table import table
from text import random_windows, read_corpus

VARIATIONS = ("schedule", "clipping", "accumulation", "resume", "constant rate", "no warm-up")
WARM_UP = 20
LOSS_BOUND = 0.01
DIRECTION_BOUND = 1e-6
# bfloat16: its unit roundoff. float32: both sides round once in each of the 20 steps that a momentum of 0.95 remembers.
MOMENTUM_BOUNDS = {"bfloat16": 2.0**-9, "float32": 2 * 20**0.5 * 2.0**-24}
EXACT: dict[str, Any] = {"gradient_dtype": "float32", "update_dtype": "float32"}

Make = Callable[[Gpt], Sequence[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Training:
    """How one training is done; ``rounded``: gradients are rounded to bfloat16 before the step."""

    variation: str
    make: Make
    steps: int
    rounded: bool = False


@dataclass(frozen=True)
class Check:
    """A figure by name, the most that it may be, and its value."""

    what: str
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as data, serving(arguments.url, Path(data)) as url:
        losses = [row for optimizer in ("Muon", "AdamW") for row in compare_losses(optimizer, arguments, url)]
        print(f"\n{losses_table(losses)}")
        checks = [adamw_direction(url), *muon_direction(url), *(momentum(url, dtype) for dtype in MOMENTUM_BOUNDS)]
    print(f"\n{checks_table(checks)}")
    broken = [check for check in checks if not check.holds]
    broken += [
        Check(f"{row.optimizer}, {row.variation}", max(row.service, row.exact), LOSS_BOUND)
        for row in losses
        if not row.holds
    ]
    for check in broken:
        print(f"FAILED: {check.what}: {check.value:.2e}, at most {check.bound:.2e}")
    raise SystemExit(1 if broken else 0)


@dataclass(frozen=True)
class Row:
    """Largest relative differences of the loss, after warm-up, from torch's optimizer in the same variation."""

    optimizer: str
    variation: str
    rounding: float
    service: float
    exact: float

    @property
    def bounded(self) -> bool:
        """Whether there is a bound. Without a warm-up differences are up to chance: rounding alone makes large ones."""
        return self.variation != "no warm-up"

    @property
    def holds(self) -> bool:
        return not self.bounded or max(self.service, self.exact) <= LOSS_BOUND


def compare_losses(optimizer: str, arguments: argparse.Namespace, url: str) -> Iterator[Row]:
    steps = arguments.steps
    here = local_muon if optimizer == "Muon" else local_adamw
    there = remote_muon if optimizer == "Muon" else remote_adamw
    for variation in arguments.variation:
        # Checkpoints are needed only where a run goes back.
        options: dict[str, Any] = {"url": url, "state": "checkpoint" if variation == "resume" else "tensors"}
        trainings = (
            ("torch", Training(variation, here, steps)),
            ("rounding alone", Training(variation, here, steps, rounded=True)),
            ("as it is", Training(variation, partial(there, **options), steps)),
            ("float32", Training(variation, partial(there, **options, **EXACT), steps)),
        )
        curves = [train(f"{optimizer} {variation}, {name}", training) for name, training in trainings]
        yield Row(optimizer, variation, *(furthest(curve, curves[0]) for curve in curves[1:]))


def local_muon(model: Gpt) -> Sequence[torch.optim.Optimizer]:
    hidden, rest = shared_out(model)
    return [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]


def remote_muon(model: Gpt, **options: Any) -> Sequence[torch.optim.Optimizer]:
    hidden, rest = shared_out(model)
    return [muond.torch.Muon(hidden, lr=0.02, **options), muond.torch.AdamW(rest, lr=3e-3, **options)]


def local_adamw(model: Gpt) -> Sequence[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.named_parameters(), lr=3e-3)]


def remote_adamw(model: Gpt, **options: Any) -> Sequence[torch.optim.Optimizer]:
    return [muond.torch.AdamW(model.named_parameters(), lr=3e-3, **options)]


def shared_out(model: Gpt) -> Sequence[Any]:
    return [group["params"] for group in suggest(model, quiet=True)]


def train(label: str, training: Training) -> list[float]:
    """The losses of all steps."""
    trainer = Trainer(training)
    losses = []
    with progress(f"{label:<34}", training.steps) as show:
        for step in range(1, training.steps + 1):
            if training.variation == "resume" and step == training.steps // 2:
                trainer = trainer.crashed_and_resumed(step)
            losses.append(trainer.step(step))
            show(step, f"loss {losses[-1]:.3f}")
    trainer.close()
    return losses


class Trainer:
    """A model and its optimizers. The batch of a step is the same whenever it is asked for."""

    text = read_corpus(ROOT).train

    def __init__(self, training: Training) -> None:
        self._training = training
        self._model = seeded_gpt(Size(width=48, depth=2, heads=4, context=32), 1)
        self._optimizers = training.make(self._model)
        factor = partial(rate_factor, training.variation, training.steps)
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in self._optimizers]

    def step(self, step: int) -> float:
        """Trains one step and returns the loss before it."""
        batch = random_windows(self.text, 8, 33, torch.Generator().manual_seed(step))
        parts = batch.chunk(4 if self._training.variation == "accumulation" else 1)
        loss = 0.0
        for part in parts:
            scaled = self._model(part) / len(parts)
            scaled.backward()
            loss += scaled.item()
        if self._training.variation == "clipping":
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 0.5)
        if self._training.rounded:
            for parameter in self._model.parameters():
                parameter.grad = parameter.grad.bfloat16().float() if parameter.grad is not None else None
        for optimizer, schedule in zip(self._optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss

    def crashed_and_resumed(self, step: int) -> Trainer:
        """Saves everything, goes on for some steps that are then lost, and begins anew from what was saved."""
        holders: list[Any] = [self._model, *self._optimizers, *self._schedules]
        # A copy, as a file is one: a state_dict shares its tensors with the model and the optimizer.
        saved = [{**holder.state_dict()} for holder in holders]
        with tempfile.TemporaryFile() as file:
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        for lost in range(step, step + 5):
            self.step(lost)
        self.close()
        again = Trainer(self._training)
        anew: list[Any] = [again._model, *again._optimizers, *again._schedules]
        for holder, state in zip(anew, saved, strict=True):
            holder.load_state_dict(state)
        return again

    def close(self) -> None:
        for optimizer in self._optimizers:
            if isinstance(optimizer, muond.torch.Optimizer):
                optimizer.close()


def rate_factor(variation: str, steps: int, step: int) -> float:
    """Up over the first tenth of the steps and then down, unless the variation is one of this."""
    if variation == "no warm-up":
        return 1.0
    return min(1.0, (step + 1) / WARM_UP) if variation == "constant rate" else rate_at(step, steps)


def furthest(losses: Sequence[float], reference: Sequence[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses[WARM_UP:], reference[WARM_UP:], strict=True))


def adamw_direction(url: str) -> Check:
    """The update before the learning rate: a step from weights of 0 leaves it."""
    ours, theirs = (torch.zeros(64, 48, requires_grad=True) for _ in range(2))
    reference = torch.optim.AdamW([theirs], lr=1e-2)
    largest = 0.0
    with muond.torch.AdamW([ours], lr=1e-2, url=url, **EXACT) as optimizer:
        for step in range(1, 201):
            gradient = torch.randn(64, 48, generator=torch.Generator().manual_seed(step))
            for weights, each in ((ours, optimizer), (theirs, reference)):
                weights.detach().zero_()
                weights.grad = gradient.clone()
                each.step()
            largest = max(largest, float((ours.detach() - theirs.detach()).abs().max()) / 1e-2)
    return Check(
        "AdamW in float32, 200 steps: largest difference of the direction from torch's", largest, DIRECTION_BOUND
    )


def muon_direction(url: str) -> Sequence[Check]:
    """torch computes Newton and Schulz's iteration in bfloat16, the service in float32: the measure is float64."""
    gradient = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.zeros(96, 64, requires_grad=True) for _ in range(2))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    torch.optim.Muon([theirs], lr=1.0).step()
    with muond.torch.Muon([ours], lr=1.0, url=url, **EXACT) as optimizer:
        optimizer.step()
    left, sigma, right = torch.linalg.svd(gradient.double() / gradient.double().norm(), full_matrices=False)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
    exact = -((96 / 64) ** 0.5) * (left * sigma) @ right
    distances = [relative(weights.detach(), exact) for weights in (ours, theirs)]
    what = "Muon, one step: distance of the direction from float64's (at most: torch's own distance)"
    return [Check(what, distances[0], distances[1])]


def momentum(url: str, dtype: Any) -> Check:
    ours, theirs = (torch.zeros(96, 64, requires_grad=True) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=0.02)
    largest = 0.0
    with muond.torch.Muon([ours], lr=0.02, url=url, gradient_dtype=dtype) as optimizer:
        for step in range(1, 201):
            gradient = torch.randn(96, 64, generator=torch.Generator().manual_seed(step))
            ours.grad, theirs.grad = gradient.clone(), gradient.clone()
            optimizer.step()
            reference.step()
            if step % 20 == 0:
                buffer = optimizer.state_dict()["state"][0]["momentum_buffer"]
                largest = max(largest, relative(buffer, reference.state[theirs]["momentum_buffer"]))
    what = f"momentum_buffer, gradients sent as {dtype}, 200 steps: largest relative difference from torch's"
    return Check(what, largest, MOMENTUM_BOUNDS[dtype])


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The Frobenius norm of the difference, divided by the norm of ``other``."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def losses_table(rows: Sequence[Row]) -> str:
    header = ("optimizer", "variation", "rounding alone", "as it is", "float32", f"at most {LOSS_BOUND:.0%}")
    lines = [
        (
            row.optimizer,
            row.variation,
            *(f"{value:.4%}" for value in (row.rounding, row.service, row.exact)),
            ("holds" if row.holds else "BROKEN") if row.bounded else "-",
        )
        for row in rows
    ]
    return f"{table([header, *lines])}\nLargest relative difference of the loss from torch's optimizer after step {WARM_UP}."


def checks_table(checks: Sequence[Check]) -> str:
    lines = [
        (check.what, f"{check.value:.2e}", f"{check.bound:.2e}", "holds" if check.holds else "BROKEN")
        for check in checks
    ]
    return table([("what", "measured", "at most", ""), *lines])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training (200)")
    parser.add_argument("--variation", nargs="+", choices=VARIATIONS, default=list(VARIATIONS), help="default: all")
    parser.add_argument("--url", help="a service with a data folder; default: one is started for as long as this runs")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps {arguments.steps}, more than {WARM_UP}: those are the warm-up")
    return arguments


if __name__ == "__main__":
    main()
