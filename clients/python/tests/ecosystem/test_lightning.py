"""Lightning: its Trainer steps, accumulates, clips, saves, resumes, finds learning rates and thaws as with torch's optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from beside import EXACT, apart, relative
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muond.torch import AdamW, Muon
from service import Service

# Of Lightning itself, about torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")
Make = Callable[[Any], torch.optim.Optimizer]


class Module(lightning.LightningModule):
    """A regression on seeded numbers, with a schedule that turns at every step."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh())
        self.head = nn.Linear(8, 8, bias=False)
        self.lr = 0.02
        self.losses: list[float] = []
        self._make = make

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        # Without names: BackboneFinetuning adds a group that has none, which torch takes to such an optimizer only.
        optimizer = self._make([p for p in self.parameters() if p.requires_grad])
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(*torch.randn(2, 128, 8, generator=generator)), batch_size=16)


def trainer(folder: Path, epochs: int, **given: Any) -> lightning.Trainer:
    options = {"enable_checkpointing": False, **given}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **quiet, **options)


def pair(service: Service, algorithm: str) -> list[Make]:
    if algorithm == "muon":
        ours: Make = lambda params: Muon(params, url=service.url, **EXACT)  # noqa: E731
        return [lambda params: torch.optim.Muon(params), ours]
    return [
        lambda params: torch.optim.AdamW(params),
        lambda params: AdamW(params, url=service.url, **EXACT),
    ]


@pytest.mark.parametrize(("algorithm", "tolerance"), [("adamw", 1e-5), ("muon", 3e-2)])
def test_a_fit_with_clipping_and_mixed_accumulation_is_torchs(
    shared: Service, tmp_path: Path, algorithm: str, tolerance: float
) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared, algorithm), strict=True):
        module = Module(make)
        accumulate = GradientAccumulationScheduler({0: 1, 1: 3})
        # With Lightning's own checkpoints of each epoch.
        options = {"gradient_clip_val": 0.5, "callbacks": [accumulate], "enable_checkpointing": True}
        trainer(tmp_path / kind, 3, **options).fit(module)
        assert module.trainer.global_step == 8 + 3 + 3
        ends.append(module)
    theirs, ours = ends
    assert ours.optimizers().param_groups[0]["lr"] == theirs.optimizers().param_groups[0]["lr"] < 0.02  # type: ignore[union-attr]
    assert apart(ours, theirs) < tolerance


def test_a_checkpoint_resumes_where_torchs_does(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared, "adamw"), strict=True):
        whole = Module(make)
        trainer(tmp_path / f"{kind}-whole", 3).fit(whole)
        first = Module(make)
        saver = trainer(tmp_path / kind, 1)
        saver.fit(first)
        saver.save_checkpoint(tmp_path / f"{kind}.ckpt")
        resumed = Module(make)
        trainer(tmp_path / kind, 3).fit(resumed, ckpt_path=str(tmp_path / f"{kind}.ckpt"))
        assert apart(resumed, whole) == 0
        ends.append(resumed)
    assert apart(ends[1], ends[0]) < 1e-5


def test_the_learning_rate_finder_leaves_no_momentum(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared, "adamw"), strict=True):
        module = Module(make)
        training = trainer(tmp_path / kind, 2)
        found = Tuner(training).lr_find(module, num_training=12, update_attr=False)
        assert found is not None
        losses = list(found.results["loss"])
        module.losses.clear()
        training.fit(module)
        ends.append((losses, module))
    (their_losses, theirs), (our_losses, ours) = ends
    assert relative(torch.tensor(our_losses), torch.tensor(their_losses)) < 1e-5
    assert relative(torch.tensor(ours.losses), torch.tensor(theirs.losses)) < 1e-5
    assert apart(ours, theirs) < 1e-5


def test_a_backbone_that_thaws_is_added_and_trained(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared, "adamw"), strict=True):
        module = Module(make)
        before = module.backbone[0].weight.detach().clone()
        thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=2, initial_denom_lr=2.0, train_bn=False)
        trainer(tmp_path / kind, 4, callbacks=[thaw]).fit(module)
        assert relative(module.backbone[0].weight, before) > 1e-3
        assert len(module.optimizers().param_groups) == 2  # type: ignore[union-attr]
        ends.append(module)
    assert apart(ends[1], ends[0]) < 1e-5


def test_averaged_weights_are_torchs(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared, "adamw"), strict=True):
        module = Module(make)
        averaged = WeightAveraging(avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9))
        trainer(tmp_path / kind, 2, callbacks=[averaged]).fit(module)
        ends.append(module)
    assert apart(ends[1], ends[0]) < 1e-5
