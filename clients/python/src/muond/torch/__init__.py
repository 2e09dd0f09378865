"""Optimizers computed by a service: ``Muon``, ``MuonClip``, ``AdamW``, ``Optimizer`` for several at once, and ``DiLoCo``."""

from __future__ import annotations

from .algorithms import AdamW, Muon, MuonClip
from .diloco import DiLoCo
from .max_logits import MaxLogits
from .optimizer import Optimizer
from .suggest import Suggestion, suggest

__all__ = ["AdamW", "DiLoCo", "MaxLogits", "Muon", "MuonClip", "Optimizer", "Suggestion", "suggest"]
