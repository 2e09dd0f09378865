"""Accelerate and Trainer shard the model with FSDP2, and the optimizer was made of it before: two processes train as torch's one."""

from __future__ import annotations

from pathlib import Path

import fsdp2
import pytest
import sharded
import torch
from processes import run_ranks

from service import Service

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def test_accelerate_with_each_policy(shared: Service, name: str, tmp_path: Path) -> None:
    run_ranks(2, tmp_path, fsdp2.accelerated, {"url": shared.url, "run": name})
    before = sharded.whole(sharded.Tied())
    for way in fsdp2.WAYS:
        expected, got = fsdp2.alone(way), torch.load(tmp_path / f"accelerated-{way}.pt")
        for key, weights in expected.items():
            # Under mixed precision activations have eight bits.
            error = {"rtol": 0.0, "atol": 2e-2} if way == "mixed" else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(got[key], weights, msg=lambda text, at=f"{way}: {key}": f"{at}: {text}", **error)
            assert torch.equal(got[key], before[key]) == key.startswith("frozen"), key


def test_trainer(shared: Service, name: str, tmp_path: Path) -> None:
    model = fsdp2.gpt2()
    expected = fsdp2.losses_of(
        fsdp2.trainer_of(fsdp2.optimizer_of(model, None, ""), model, tmp_path / "alone", batch=4)
    )
    run_ranks(2, tmp_path, fsdp2.trained, {"url": shared.url, "run": name})
    losses, weights = torch.load(tmp_path / "trained.pt")
    assert losses == pytest.approx(expected, rel=1e-4)
    for key, tensor in sharded.whole(model).items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-4, atol=1e-5)
