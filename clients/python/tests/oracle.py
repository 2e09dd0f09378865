"""What the service should compute, in float64, written to be read beside docs/algorithms.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
KELLER_JORDAN = (3.4445, -4.775, 2.0315)


def orthogonalized(u: Array, steps: int = 5, coefficients: Sequence[float] = KELLER_JORDAN) -> Array:
    """U·p(Σ/‖u‖)·Vᵀ, with p the composed polynomial."""
    left, sigma, right = np.linalg.svd(u / np.linalg.norm(u), full_matrices=False)
    a, b, c = coefficients
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return np.asarray((left * sigma) @ right)


@dataclass
class Muon:
    """torch.optim.Muon in float64, for one matrix."""

    weights: Array
    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    buffer: Array = field(init=False)

    def __post_init__(self) -> None:
        self.weights = self.weights.astype(np.float64)
        self.buffer = np.zeros_like(self.weights)

    def step(self, gradient: npt.NDArray[Any]) -> None:
        g = gradient.astype(np.float64)
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * g
        direction = orthogonalized(self.momentum * self.buffer + (1 - self.momentum) * g)
        rows, cols = self.weights.shape
        self.weights *= 1 - self.lr * self.weight_decay
        self.weights -= self.lr * max(1, rows / cols) ** 0.5 * direction


@dataclass
class AdamW:
    """torch.optim.AdamW in float64."""

    weights: Array
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    steps: int = 0

    def __post_init__(self) -> None:
        self.weights = self.weights.astype(np.float64)
        self.exp_avg = np.zeros_like(self.weights)
        self.exp_avg_sq = np.zeros_like(self.weights)

    def step(self, gradient: npt.NDArray[Any]) -> None:
        g = gradient.astype(np.float64)
        self.steps += 1
        b1, b2 = self.betas
        self.exp_avg = b1 * self.exp_avg + (1 - b1) * g
        self.exp_avg_sq = b2 * self.exp_avg_sq + (1 - b2) * g * g
        corrected = self.exp_avg_sq / (1 - b2**self.steps)
        direction = self.exp_avg / (1 - b1**self.steps) / (np.sqrt(corrected) + self.eps)
        self.weights = (1 - self.lr * self.weight_decay) * self.weights - self.lr * direction


def distance(value: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Relative Frobenius distance."""
    a, b = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
