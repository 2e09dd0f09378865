"""What each rank does that trains under Accelerate, or Hugging Face's Trainer, with fsdp_version 2, and the same in one process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import sharded
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from muond.torch import AdamW, Optimizer
from muond.torch.shards import is_sharded

STEPS = 4
EXACT: Any = {"gradient_dtype": "float32", "update_dtype": "float32"}
# Accelerate's word for what it gives to fully_shard.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"reshard_after_forward": True},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"cpu_offload": CPUOffloadPolicy(pin_memory=False)},
    "mixed": {},
}


def accelerator(way: str) -> Accelerator:
    """Accelerate shards on devices alone: where it has counted two processes without one its state is told that they are some."""
    AcceleratorState._reset_state()
    made = Accelerator(cpu=True, mixed_precision="bf16" if way == "mixed" else "no")
    assert made.distributed_type == DistributedType.MULTI_CPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **WAYS[way])
    if way == "mixed":
        plugin.set_mixed_precision("bf16")
    made.state.distributed_type = DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    return made


def loss_of(module: torch.nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(10, (4, 7), generator=torch.Generator().manual_seed(seed))
    logits = module(tokens[:, :-1]).flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def optimizer_of(module: torch.nn.Module, url: str | None, run: str) -> torch.optim.Optimizer:
    """Ours, or torch's where there is no service."""
    if url is None:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    return AdamW(module.named_parameters(), lr=1e-2, url=url, run=run, **EXACT)


def accelerated(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Tied and frozen parameters, clipped over the ranks, with each policy; the batches are those of one process, which is torch's."""
    _as_launched(rank, world_size)
    for way in WAYS:
        made = accelerator(way)
        module = sharded.Tied()
        optimizer = optimizer_of(module, given["url"], f"{given['run']}-{way}")
        model, wrapped = made.prepare(module, optimizer)
        for step in range(STEPS):
            wrapped.zero_grad()
            made.backward(loss_of(model, 10 * step + rank))
            norm = made.clip_grad_norm_(model.parameters(), 0.05)
            assert float(getattr(norm, "full_tensor", lambda norm=norm: norm)()) > 0.05
            wrapped.step()
        assert isinstance(optimizer, AdamW)
        assert all(is_sharded(parameter) for parameter in model.parameters())
        assert optimizer.run.members == dict.fromkeys(range(world_size), True)
        weights = sharded.whole(model)
        optimizer.close()
        if rank == 0:
            torch.save(weights, folder / f"accelerated-{way}.pt")


def alone(way: str) -> dict[str, torch.Tensor]:
    """What torch's AdamW comes to in one process, with the mean of both ranks' gradients."""
    module = sharded.Tied()
    optimizer = optimizer_of(module, None, "")
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "mixed"):
            loss = (loss_of(module, 10 * step) + loss_of(module, 10 * step + 1)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        optimizer.step()
    return sharded.whole(module)


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=12, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config)


def trainer_of(optimizer: torch.optim.Optimizer, model: GPT2LMHeadModel, out: Path, batch: int) -> Trainer:
    arguments = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        data_seed=1,
    )
    return Trainer(model, arguments, train_dataset=Windows(), optimizers=(optimizer, None))  # type: ignore[arg-type]


def losses_of(trainer: Trainer) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(rank: int, world_size: int, folder: Path, given: dict[str, Any]) -> None:
    """Trainer, whose accelerator shards with FSDP2."""
    _as_launched(rank, world_size)
    model = gpt2()
    optimizer = optimizer_of(model, given["url"], given["run"])
    trainer = trainer_of(optimizer, model, folder / "out", batch=2)
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, transformer_cls_names_to_wrap=["GPT2Block"]
    )
    trainer.is_fsdp_enabled = True
    losses = losses_of(trainer)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.step_count == STEPS
    assert all(is_sharded(parameter) for parameter in trainer.model.parameters())
    assert optimizer.run.members == dict.fromkeys(range(world_size), True)
    weights = sharded.whole(trainer.model)
    optimizer.close()
    if rank == 0:
        torch.save((losses, weights), folder / "trained.pt")


def _as_launched(rank: int, world_size: int) -> None:
    """What torchrun would say; the process group is there already."""
    assert dist.is_initialized()
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in launched.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"})
