"""fastai's Learner with OptimWrapper around this package's optimizer; torch's own is wrapped beside it in each test.

fastai brings hundreds of megabytes of other packages, so that this is no part of the suite: README.md, "Tests", has its command.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from beside import EXACT, apart, relative
from fastai.callback import schedule  # adds fit_one_cycle and lr_find to Learner
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muond.torch import AdamW, Muon
from service import Service

Make = Callable[..., Any]


def pair(service: Service, algorithm: str = "adamw") -> list[Make]:
    theirs = {"adamw": torch.optim.AdamW, "muon": torch.optim.Muon}[algorithm]
    ours = {"adamw": AdamW, "muon": Muon}[algorithm]
    return [
        partial(OptimWrapper, opt=theirs),
        partial(OptimWrapper, opt=partial(ours, url=service.url, **EXACT)),
    ]


assert schedule


def learner(make: Make, folder: Path, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    numbers = torch.randn(2, 128, 8, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(*numbers), batch_size=16)
    data = DataLoaders(loader, loader, device=torch.device("cpu"))
    return Learner(data, model, loss_func=nn.functional.mse_loss, opt_func=make, path=folder, **options)


@pytest.mark.parametrize(("algorithm", "tolerance"), [("adamw", 1e-5), ("muon", 3e-2)])
def test_one_cycle_with_clipping_and_accumulation_is_torchs(
    shared: Service, tmp_path: Path, algorithm: str, tolerance: float
) -> None:
    ends = []
    for make in pair(shared, algorithm):
        learn = learner(make, tmp_path, cbs=[GradientAccumulation(32), GradientClip(0.5)])
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, 0.02)
        ends.append(learn.model)
    assert apart(ends[1], ends[0]) < tolerance


def test_the_learning_rate_finder_leaves_no_momentum(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared), strict=True):
        learn = learner(make, tmp_path / kind)
        with learn.no_bar(), learn.no_logging():
            found = learn.lr_find(num_it=20, show_plot=False)
            losses = torch.stack([torch.as_tensor(loss) for loss in learn.recorder.losses])
            learn.fit(2, 0.02)
        ends.append((float(found.valley), losses, learn.model))
    (their_rate, their_losses, theirs), (our_rate, our_losses, ours) = ends
    assert our_rate == pytest.approx(their_rate)
    assert relative(our_losses, their_losses) < 1e-5
    assert apart(ours, theirs) < 1e-5


def test_a_saved_learner_is_loaded_with_its_state(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared), strict=True):
        learn = learner(make, tmp_path / kind)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.02)
            learn.save("one")
            learn.fit(1, 0.02, reset_opt=False)
            whole = learn.model
            again = learner(make, tmp_path / kind)
            again.create_opt()
            again.load("one")
            with again.no_bar(), again.no_logging():
                again.fit(1, 0.02, reset_opt=False)
        assert apart(again.model, whole) < 1e-6
        ends.append(again.model)
    assert apart(ends[1], ends[0]) < 1e-5


def test_layers_are_frozen_and_thawed(shared: Service, tmp_path: Path) -> None:
    ends = []
    for kind, make in zip(("theirs", "ours"), pair(shared), strict=True):
        split: Any = lambda model: [list(model[0].parameters()), list(model[2].parameters())]  # noqa: E731
        learn = learner(make, tmp_path / kind, splitter=split)
        before = learn.model[0].weight.detach().clone()
        with learn.no_bar(), learn.no_logging():
            learn.freeze()
            learn.fit(1, 0.02)
            assert torch.equal(learn.model[0].weight, before)
            learn.unfreeze()
            learn.fit(1, slice(0.002, 0.02), reset_opt=False)
        assert relative(learn.model[0].weight, before) > 1e-4
        ends.append(learn.model)
    assert apart(ends[1], ends[0]) < 1e-5
