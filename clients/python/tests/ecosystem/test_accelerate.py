"""Accelerate: an optimizer of this package is prepared, accumulated, clipped, saved and loaded as torch's is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from models import distance, examples, net
from patient import PATIENT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muond.torch import AdamW
from service import Service

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    # Of a DataLoader without a GPU, and of torch's own about what Accelerate calls.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}


class Trainer:
    """A loop as Accelerate's documentation has it, with accumulation over two batches, clipping and a schedule."""

    def __init__(self, optimizer: Callable[[nn.Module], torch.optim.Optimizer], precision: str = "no") -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        self.model = net()
        self.optimizer = optimizer(self.model)
        schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        x, y = zip(*(examples(step) for step in range(1, 25)), strict=True)
        loader: Any = DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=16)
        parts = self.accelerator.prepare(self.model, self.optimizer, loader, schedule)
        self._prepared, self._optimizer, self._loader, self._schedule = parts

    def epoch(self, batches: int | None = None, first: int = 0) -> None:
        """Twelve steps, or those of so many batches, after ``first`` batches were left out."""
        loader = self.accelerator.skip_first_batches(self._loader, first)
        for index, (x, y) in enumerate(loader):
            if index == batches:
                return
            with self.accelerator.accumulate(self._prepared):
                loss = F.cross_entropy(self._prepared(x).float(), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self._prepared.parameters(), 0.7)
                self._optimizer.step()
                self._schedule.step()
                self._optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_epoch_is_torchs(shared: Service, name: str, precision: str) -> None:
    theirs = Trainer(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2), precision)
    theirs.epoch()

    def remote(model: nn.Module) -> torch.optim.Optimizer:
        return AdamW(model.named_parameters(), lr=1e-2, url=shared.url, run=name, **EXACT)

    ours = Trainer(remote, precision)
    ours.epoch()
    assert isinstance(ours.optimizer, AdamW)
    assert ours.optimizer.step_count == 12
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"] < 1e-2
    # Under autocast a rounding of a weight may turn one of an activation.
    assert distance(ours.model, theirs.model) < (1e-5 if precision == "no" else 5e-3)
    ours.optimizer.close()


def test_a_trainer_that_crashed_goes_on_from_a_saved_state(
    durable: Callable[..., Service], name: str, tmp_path: Path
) -> None:
    service = durable()

    def remote(run: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
        options: Any = {"state": "checkpoint", "takeover": True, **PATIENT}
        return lambda model: AdamW(model.named_parameters(), lr=1e-2, url=service.url, run=run, **options)

    alone = Trainer(remote(f"{name}-alone"))
    alone.epoch()
    crashed = Trainer(remote(name))
    crashed.epoch(10)
    crashed.accelerator.save_state(str(tmp_path / "saved"))
    # What comes after the save is lost with the trainer, but not in the service.
    crashed.epoch(16, first=10)
    assert isinstance(crashed.optimizer, AdamW)
    assert crashed.optimizer.step_count > 5
    crashed.optimizer.close()
    again = Trainer(remote(name))
    again.accelerator.load_state(str(tmp_path / "saved"))
    assert isinstance(again.optimizer, AdamW)
    assert again.optimizer.step_count == 5
    again.epoch(first=10)
    assert isinstance(alone.optimizer, AdamW)
    assert again.optimizer.run.digest == alone.optimizer.run.digest
    assert distance(again.model, alone.model) == 0
    for trainer in (again, alone):
        assert isinstance(trainer.optimizer, AdamW)
        trainer.optimizer.close()
