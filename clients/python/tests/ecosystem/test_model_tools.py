"""Tools that make the groups, the model or the loop: timm, peft, optuna, torch's averages. torch's optimizer does the same beside."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import optuna
import peft
import pytest
import timm.optim
import timm.scheduler
import timm.utils
import torch
from beside import EXACT, apart, relative
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel

from muond.rest import Rest
from muond.torch import AdamW, Optimizer, suggest
from muond.transport.address import endpoint
from service import Service

# Of peft itself, about transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
Make = Callable[[Any], torch.optim.Optimizer]


def pair(service: Service, **hyperparameters: Any) -> list[Make]:
    # The keys' bias of an attention has a gradient of nothing but roundings, which a small eps would make as large as any.
    values = {"lr": 0.01, "eps": 1e-3, **hyperparameters}
    return [
        lambda params: torch.optim.AdamW(params, **values),
        lambda params: AdamW(params, url=service.url, **values, **EXACT),
    ]


def vision(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5)


def vision_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.zero_grad()
    images, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(5, (8,), generator=generator)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


# timm


def test_layer_decay_with_timms_groups_and_scheduler(shared: Service) -> None:
    ends, rates = [], []
    for make in pair(shared):
        model = vision()
        groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
        optimizer = make(groups)
        schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=6, warmup_t=2, warmup_lr_init=1e-4)
        had = []
        for step in range(6):
            schedule.step(step)
            had.append([(group["lr"], group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups])
            vision_step(model, optimizer, step)
        ends.append(model)
        rates.append(had)
    assert rates[0] == rates[1]
    assert len({scale for _, scale, _ in rates[1][0]}) > 3
    assert apart(ends[1], ends[0]) < 1e-4


def test_timms_model_ema_lookahead_and_clipping(shared: Service) -> None:
    ends = []
    for make in pair(shared):
        model = vision()
        optimizer = timm.optim.Lookahead(make(model.parameters()), alpha=0.5, k=3)
        averaged = timm.utils.ModelEmaV3(model, decay=0.9)
        for step in range(7):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            images, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5
            nn.functional.cross_entropy(model(images), labels).backward()
            timm.utils.dispatch_clip_grad(model.parameters(), 0.02, mode="agc")
            optimizer.step()
            averaged.update(model)
        ends.append((model, averaged.module))
    (their_model, their_average), (model, average) = ends
    assert apart(model, their_model) < 1e-4
    assert apart(average, their_average) < 1e-4


def test_suggest_gives_a_vision_transformer_to_muon_and_adamw(shared: Service) -> None:
    model = vision()
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 1e-3}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=shared.url) as optimizer:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        vision_step(model, optimizer, 1)
        algorithm = {name: group["algorithm"] for group in optimizer.param_groups for name in group["param_names"]}
    assert algorithm["blocks.0.attn.qkv.weight"] == algorithm["blocks.2.mlp.fc1.weight"] == "muon"
    assert {algorithm[name] for name in ("head.weight", "pos_embed", "cls_token", "norm.weight")} == {"adamw"}
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


# peft


def language_model() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    base = GPT2LMHeadModel(config)
    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def language_steps(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        words = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=words, labels=words).loss.backward()
        optimizer.step()


def test_only_the_adapters_of_lora_are_declared_and_trained(shared: Service) -> None:
    ends = []
    for make in pair(shared):
        model = language_model()
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        # As most programs do it: all parameters, of which the frozen ones have no gradient.
        optimizer = make(model.parameters())
        language_steps(model, optimizer, range(6))
        assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
        ends.append((model, optimizer))
    (theirs, _), (ours, optimizer) = ends
    assert isinstance(optimizer, AdamW)
    assert len(optimizer.run.parameters) == sum(p.requires_grad for p in ours.parameters()) == 4
    assert apart(ours, theirs) < 1e-4


def test_a_second_adapter_is_added_and_the_first_merged(shared: Service) -> None:
    ends = []
    for make in pair(shared):
        model = language_model()
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        language_steps(model, optimizer, range(3))
        torch.manual_seed(1)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        model.set_adapter("second")
        optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.02})
        language_steps(model, optimizer, range(3, 6))
        ends.append(model.merge_and_unload(adapter_names=["default", "second"]))
    assert apart(ends[1], ends[0]) < 1e-4


@pytest.mark.filterwarnings("ignore:.*Conv1D.*:UserWarning")
def test_suggest_gives_loras_factors_to_muon(shared: Service) -> None:
    model = language_model()
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 1e-3}, quiet=True)
    with Optimizer(model.named_parameters(), groups, url=shared.url) as optimizer:
        language_steps(model, optimizer, range(2))
        names = {p.name for p in optimizer.run.parameters}
    assert all("lora_" in name for name in names)
    assert len(names) == 4


# optuna


def test_a_sweep_of_optuna_is_torchs_and_leaves_no_run(start: Callable[..., Service]) -> None:
    # Fewer runs than trials: one that stayed would be in the way of the others.
    service = start("--max-runs", "2")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    values = []
    for ours in (False, True):

        def objective(trial: optuna.Trial, *, ours: bool = ours) -> float:
            rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
            decay = trial.suggest_float("weight_decay", 0.0, 0.1)
            model = vision()
            make = pair(service, lr=rate, weight_decay=decay)[ours]
            optimizer = make(model.parameters())
            for step in range(3):
                vision_step(model, optimizer, step)
                trial.report(sum(float(p.detach().square().sum()) for p in model.parameters()), step)
                if trial.should_prune():
                    raise optuna.TrialPruned
            return sum(float(p.detach().square().sum()) for p in model.parameters())

        pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=3), pruner=pruner)
        study.optimize(objective, n_trials=8)
        values.append(torch.tensor([trial.value or 0.0 for trial in study.trials]))
    assert relative(values[1], values[0]) < 1e-4
    # The error of a pruned trial holds its optimizer in a cycle.
    gc.collect()
    with Rest(endpoint(service.url)) as rest:
        assert rest._json("GET", "/v1/runs")["runs"] == []


# torch's averages of weights


def test_ema_and_swa_with_their_schedule(shared: Service) -> None:
    ends = []
    for make in pair(shared):
        model = vision()
        optimizer = make(model.parameters())
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        swa, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for step in range(6):
            vision_step(model, optimizer, step)
            ema.update_parameters(model)
            if step >= 3:
                swa.update_parameters(model)
                schedule.step()
        ends.append((model, ema, swa))
    for theirs, ours in zip(*ends, strict=True):
        assert apart(ours, theirs) < 1e-4
