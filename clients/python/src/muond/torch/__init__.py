"""The optimizers of torch.optim, computed by a service: ``Muon``, ``MuonClip``, ``AdamW``, and ``Optimizer`` for several at once."""

from __future__ import annotations

from .algorithms import AdamW, Muon, MuonClip
from .max_logits import MaxLogits
from .optimizer import Optimizer
from .suggest import Suggestion, suggest

__all__ = ["AdamW", "MaxLogits", "Muon", "MuonClip", "Optimizer", "Suggestion", "suggest"]
