"""The optimizers that the examples compare: torch's own in this process, and the same computed by a service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpt import Gpt
from muond.torch import MaxLogits, Optimizer, suggest

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Rates:
    """Learning rates of Muon's matrices, of MuonClip's (which have AdamW's update RMS), and of AdamW's parameters."""

    muon: float
    muonclip: float
    adamw: float


@dataclass(frozen=True)
class Wanted:
    """An entry of --optimizer for a model; ``threshold`` is QK-clip's, ``options`` are for the service's optimizers."""

    name: str
    rates: Rates
    threshold: float
    options: Mapping[str, Any]


NAMES = ("local-adamw", "local-muon", "muond-muon", "muond-muonclip")


def make_optimizers(model: Gpt, wanted: Wanted, max_logits: MaxLogits) -> Sequence[torch.optim.Optimizer]:
    """Muon takes the hidden matrices and AdamW the rest: torch needs two optimizers for that, the service one run."""
    adamw: dict[str, Any] = {"lr": wanted.rates.adamw, "betas": BETAS}
    if wanted.name == "local-adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    if wanted.name == "local-muon":
        hidden, rest = ([parameter for _, parameter in group["params"]] for group in suggest(model, quiet=True))
        return [torch.optim.Muon(hidden, lr=wanted.rates.muon), torch.optim.AdamW(rest, **adamw)]
    if wanted.name == "muond-muon":
        groups = suggest(model, muon={"lr": wanted.rates.muon}, adamw=adamw, quiet=True)
        return [Optimizer(model.named_parameters(), groups, **wanted.options)]
    groups = suggest(model, muon={"algorithm": "muonclip", "lr": wanted.rates.muonclip}, adamw=adamw, quiet=True)
    clip: dict[str, Any] = {"attentions": model.attentions(wanted.threshold), "max_logits": max_logits}
    return [Optimizer(model.named_parameters(), groups, **clip, **wanted.options)]


def watched(model: Gpt) -> MaxLogits:
    """Measures the logits of every layer, under the names that ``model.attentions`` gives them."""
    max_logits = MaxLogits()
    layers: dict[str, nn.Module] = {
        f"h.{layer}": block.get_submodule("attention") for layer, block in enumerate(model.h)
    }
    max_logits.watch(layers)
    return max_logits


def close(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """The service forgets the runs of an example when it ends."""
    for optimizer in optimizers:
        if isinstance(optimizer, Optimizer):
            optimizer.close(delete=True)
