"""torch.compile and the wrappers of data parallel training: the same steps, and names that are the model's own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batches, distance, gpt, net, saved_and_loaded, train
from torch import nn

from muond.torch import AdamW, Optimizer, suggest
from service import Service

EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}


def headed() -> nn.Module:
    """A model whose head has a name that is one only at the top."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(12, 24))
    model.add_module("attention", nn.MultiheadAttention(24, 2))
    model.add_module("fc", nn.Linear(24, 6))
    return model


# inductor writes C++, and warns of things that are its own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("overlap", [False, True])
def test_a_compiled_gpt_trains_as_torchs_optimizer_trains_it(shared: Service, name: str, overlap: bool) -> None:
    ours, theirs = gpt(width=16, layers=1), gpt(width=16, layers=1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    with AdamW(ours.named_parameters(), lr=1e-2, url=shared.url, run=name, overlap=overlap, **EXACT) as optimizer:
        for model, each in ((ours, optimizer), (theirs, reference)):
            compiled: Any = torch.compile(model)
            for batch in itertools.islice(batches(), 8):
                each.zero_grad()
                logits = compiled(batch[:, :-1])
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
                each.step()
    assert distance(ours, theirs) < 1e-4


def test_a_compiled_model_is_shared_out_as_the_model_is() -> None:
    plain = suggest(headed(), quiet=True)
    compiled = suggest(torch.compile(headed()), quiet=True)  # type: ignore[arg-type]
    assert compiled.reasons == plain.reasons
    assert plain.reasons["fc.weight"] == "head"
    assert compiled.table == plain.table
    assert compiled[0]["layouts"] == {"attention.in_proj_weight": {"split": [24, 24, 24]}}


def test_the_rules_do_not_see_what_wraps_a_model(tmp_path: Path) -> None:
    plain = suggest(headed(), quiet=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(headed())
        for wrapped in (
            parallel,
            torch.compile(parallel),
            nn.parallel.DistributedDataParallel(torch.compile(headed())),
        ):  # type: ignore[arg-type]
            suggestion = suggest(wrapped, quiet=True)  # type: ignore[arg-type]
            assert suggestion.reasons == {f"module.{name}": why for name, why in plain.reasons.items()}
    finally:
        dist.destroy_process_group()


def test_a_run_knows_a_compiled_model_by_the_same_names(shared: Service, name: str) -> None:
    alone, model = net(), net()
    with AdamW(alone.named_parameters(), lr=1e-2, url=shared.url, run=f"{name}-alone", **EXACT) as optimizer:
        train(alone, optimizer, 6)
        digest = optimizer.run.digest
    with AdamW(model.named_parameters(), lr=1e-2, url=shared.url, run=name, **EXACT) as optimizer:
        train(model, optimizer, 3)
        kept = saved_and_loaded(optimizer.state_dict())
    compiled: Any = torch.compile(model, backend="aot_eager")
    groups = [{"parameters": ["0.*", "2.*"], "algorithm": "adamw", "lr": 1e-2, "name": "adamw"}]
    with Optimizer(compiled.named_parameters(), groups, url=shared.url, run=name, **EXACT) as optimizer:
        optimizer.load_state_dict(kept)
        assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        train(compiled, optimizer, 3, 4)
        assert optimizer.run.digest == digest
    assert distance(model, alone) == 0
