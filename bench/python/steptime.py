"""How long one training step of a GPT-2 takes with its optimizer in a service, with overlap and without."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from muond.torch import Optimizer, suggest

from gpt import Gpt, gpt


@dataclass(frozen=True)
class StepTime:
    """Seconds of the median step: ``backward`` and ``step`` are parts of ``whole``; ``all`` has every ``whole``."""

    algorithm: str
    overlap: bool
    parameters: int
    whole: float
    backward: float
    step: float
    all: tuple[float, ...]


def step_times(
    device: torch.device, url: str, run: str, *, algorithm: str, overlap: bool, steps: int, tokens: tuple[int, int]
) -> StepTime:
    """Times steps of GPT-2 124M in float32, with a forward pass in bfloat16, but not the first step, which allocates.

    ``algorithm``: ``muon`` (for the matrices, AdamW for the rest) or ``adamw`` (for all). ``tokens``: batch and length.
    """
    torch.manual_seed(0)
    model: Gpt = gpt(device)
    batch = torch.randint(50257, tokens, generator=torch.Generator().manual_seed(1)).to(device)
    times: list[tuple[float, float, float]] = []
    groups = suggest(model, muon={"algorithm": algorithm, "lr": 1e-4}, adamw={"lr": 1e-4}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=url, run=run, overlap=overlap) as optimizer:
        for _ in range(steps + 1):
            optimizer.zero_grad()
            began = _now(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model.loss(batch)
            forward = _now(device)
            loss.backward()  # type: ignore[no-untyped-call]
            backward = _now(device)
            optimizer.step()
            ended = _now(device)
            times.append((ended - began, backward - forward, ended - backward))
        optimizer.close(delete=True)  # its state is as large as the model, twice
    whole, back, step = (statistics.median(column) for column in zip(*times[1:], strict=True))
    count = sum(parameter.numel() for parameter in model.parameters())
    return StepTime(algorithm, overlap, count, whole, back, step, tuple(time[0] for time in times[1:]))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
