"""Hugging Face's Trainer: given an optimizer of this package it trains as with torch's, and goes on after kill -9."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run, start
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from muond.rest import Rest
from muond.torch import AdamW, Optimizer, suggest
from muond.transport.address import endpoint
from service import ROOT, Proxy, Service

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}


class Windows(Dataset[dict[str, torch.Tensor]]):
    """128 windows of this repository's text."""

    def __init__(self) -> None:
        text = torch.frombuffer(bytearray((ROOT / "docs" / "algorithms.md").read_bytes()), dtype=torch.uint8).long()
        self._windows = text[: 128 * 24].view(128, 24)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=24, n_embd=32, n_layer=1, n_head=2))


def trained(optimizer: torch.optim.Optimizer, model: GPT2LMHeadModel, out: Path, **more: Any) -> list[float]:
    """The losses of 12 steps, with Trainer's own scheduler and clipping."""
    arguments = TrainingArguments(
        str(out),
        max_steps=12,
        per_device_train_batch_size=8,
        warmup_steps=3,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )
    trainer = Trainer(model, arguments, train_dataset=Windows(), optimizers=(optimizer, None))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "more", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=["plain", "bf16", "accumulated"]
)
def test_losses_are_those_with_torchs_optimizer(
    shared: Service, name: str, tmp_path: Path, more: dict[str, Any]
) -> None:
    theirs = gpt2()
    expected = trained(torch.optim.AdamW(theirs.parameters(), lr=1e-2), theirs, tmp_path, **more)
    ours = gpt2()
    with AdamW(ours.named_parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        losses = trained(optimizer, ours, tmp_path, **more)
        assert optimizer.step_count == 12
    assert losses == pytest.approx(expected, rel=2e-3 if "bf16" in more else 1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_may_make_the_optimizer_itself(shared: Service, name: str, tmp_path: Path) -> None:
    model = gpt2()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, dataloader_pin_memory=False
    )
    given: dict[str, Any] = {"model": model, "groups": suggest(model, quiet=True), "url": shared.url, "run": name}
    trainer = Trainer(model, arguments, train_dataset=Windows(), optimizer_cls_and_kwargs=(Optimizer, given))
    trainer.train()
    with Rest(endpoint(shared.url)) as rest:
        assert rest.run(name)["step"] == 2
        assert set(rest.run(name)["groups"]) == {"muon", "adamw"}


STEPS, EVERY, EPOCH = 24, 5, 20
FLAGS = ("--optimizer", "muond", "--width", 32, "--depth", 1, "--context", 16, "--batch", 4, "--windows", 4 * EPOCH)


def test_a_trainer_killed_mid_epoch_resumes_to_the_same_losses_and_weights(
    durable: Callable[..., Service], proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    service = durable()
    flags = (*FLAGS, "--steps", STEPS, "--save-steps", EVERY, "--out")
    through = proxy(service.port)
    status, _, errors = run("train_hf.py", *flags, "alone", "--url", through.url, cwd=tmp_path)
    assert status == 0, errors
    [alone] = json.loads((tmp_path / "alone" / "losses.json").read_text())

    # The kernel kills it when so many bytes have gone by, wherever in a step that is: the first connection only looks for the service.
    # The last one asks, at the end, whether a folder keeps the run that nobody has named.
    assert through.connections == 3
    ready: list[Any] = []
    cutting = proxy(service.port, [1 << 40, int(through.relayed * 0.57)], lambda: ready[0].kill())
    with start("train_hf.py", *flags, "killed", "--url", cutting.url, cwd=tmp_path) as process:
        ready.append(process)
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "killed" / "muond" / "checkpoint-10" / "optimizer.pt", weights_only=True)["muond"]
    assert not (tmp_path / "killed" / "muond" / "checkpoint-15").exists()
    with Rest(endpoint(service.url)) as rest:
        assert 10 < rest.run(saved["run"])["step"] < EPOCH

    status, _, errors = run("train_hf.py", *flags, "killed", "--resume", "--url", service.url, cwd=tmp_path)
    assert status == 0, errors
    [resumed] = json.loads((tmp_path / "killed" / "losses.json").read_text())
    losses = [
        [(entry["step"], entry["loss"]) for entry in one["history"] if "loss" in entry] for one in (alone, resumed)
    ]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
    assert losses[1] == losses[0]
    assert resumed["weights"] == alone["weights"]
