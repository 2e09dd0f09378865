"""muond: the optimizer as a service. ``from muond import Muon`` is torch.optim.Muon, computed elsewhere.

Importing this package does not import torch; the names that need it are looked up in ``muond.torch`` when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .declaration import Member, Parameter, Quorum
from .error import ErrorFields, MuondError
from .receipt import Checkpoint, Receipt
from .run import Run, open_run
from .steps.backoff import Backoff

if TYPE_CHECKING:
    from .torch import AdamW, DiLoCo, MaxLogits, Muon, MuonClip, Optimizer, suggest

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Backoff",
    "Checkpoint",
    "DiLoCo",
    "ErrorFields",
    "MaxLogits",
    "Member",
    "Muon",
    "MuonClip",
    "MuondError",
    "Optimizer",
    "Parameter",
    "Quorum",
    "Receipt",
    "Run",
    "open_run",
    "suggest",
]

_TORCH = ("AdamW", "DiLoCo", "MaxLogits", "Muon", "MuonClip", "Optimizer", "suggest")


def __getattr__(name: str) -> Any:
    if name not in (*_TORCH, "torch"):
        raise AttributeError(f"module 'muond' has no attribute '{name}'")
    try:
        torch = import_module(".torch", __name__)
    except ModuleNotFoundError as error:  # pragma: no cover - in a process without torch, which is not measured
        # The second one comes with torch.
        if error.name not in ("torch", "typing_extensions"):
            raise
        raise ImportError(f"muond.{name} needs PyTorch, which is not installed: pip install 'muond[torch]'") from error
    return torch if name == "torch" else getattr(torch, name)
