"""A trainer in numpy whose gradients depend on its weights, so that anything applied twice, late or not at all shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import muond

QUICK = muond.Backoff(first_seconds=0.001, most_seconds=0.01)
GROUPS = [
    {"name": "matrices", "algorithm": "muon", "lr": 0.02},
    {"name": "rest", "algorithm": "adamw", "lr": 0.01},
]
SHAPES = {"up": (96, 40), "down": (40, 96), "bias": (96,), "scale": ()}


class Trainer:
    """Pulls its weights to a target: the gradients of |W - T|²/2, with noise of its own in every step."""

    def __init__(self, seed: int = 1, dtype: str = "float32") -> None:
        self._generator = np.random.default_rng(seed)
        self.dtype = dtype
        self.weights = {name: self._noise(shape) for name, shape in SHAPES.items()}
        self._targets = {name: self._noise(shape) for name, shape in SHAPES.items()}

    def parameters(self) -> list[muond.Parameter]:
        return [
            muond.Parameter(
                name,
                "matrices" if array.ndim == 2 else "rest",
                array,
                gradient_dtype=self.dtype,
                update_dtype=self.dtype,
            )
            for name, array in self.weights.items()
        ]

    def gradients(self, step: int) -> dict[str, npt.NDArray[np.float32]]:
        """Those of a step are the same whenever they are asked for, as long as the weights are."""
        noise = np.random.default_rng(1000 + step)
        return {
            name: np.asarray(w - self._targets[name] + noise.standard_normal(w.shape, np.float32), np.float32)
            for name, w in self.weights.items()
        }

    def open(self, url: str, run: str, **options: Any) -> muond.Run:
        options = {"groups": GROUPS, "backoff": QUICK, **options}
        return muond.open_run(url, run=run, parameters=self.parameters(), **options)

    def train(self, run: muond.Run, steps: int) -> str:
        """Takes so many steps; the run's digest afterwards."""
        for _ in range(steps):
            run.step(self.gradients(run.step_count + 1))
        return run.digest

    def bytes(self) -> bytes:
        return b"".join(array.tobytes() for array in self.weights.values())

    def _noise(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return np.asarray(self._generator.standard_normal(shape), np.float32)
