"""A trainer for ``muond conformance --quadratic``: with the loss |W|²/2 every gradient is the weights."""

from __future__ import annotations

import os

import numpy as np

import muond
from muond import MuondError, Parameter

STEPS = 14


def train(url: str) -> None:
    """Trains until the run is lost, or for ``STEPS`` steps."""
    random = np.random.default_rng(1)
    weights = {"wide": (8, 12), "tall": (20, 6), "bias": (3,)}
    parameters = [
        Parameter(name, "muon" if len(shape) == 2 else "adamw", random.standard_normal(shape, np.float32))
        for name, shape in weights.items()
    ]
    groups = [
        {"name": "muon", "algorithm": "muon", "lr": 0.02},
        {"name": "adamw", "algorithm": "adamw", "lr": 0.01, "weight_decay": 0.1},
    ]
    with muond.open_run(url, run="quadratic", groups=groups, parameters=parameters) as run:
        for step in range(1, STEPS + 1):
            gradients = {parameter.name: parameter.data.copy() for parameter in parameters}
            options = {"adamw": {"lr": 0.01 / step}}
            try:
                run.step(gradients, groups=options)
            except MuondError as error:
                if error.code == "RUN_NOT_FOUND":
                    return
                if error.code != "GRADIENT_NOT_FINITE":
                    raise
                run.step(gradients, groups=options)


if __name__ == "__main__":
    train(os.environ["MUOND_URL"])
