"""SGD whose momentum begins after its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..hyperparameters import plain
from ..slots import group_names

if TYPE_CHECKING:
    from ..home import Home


def begin_late_momentum(home: Home) -> None:
    """Takes the buffer of zeros away from parameters whose group had no momentum and has some now.

    torch takes the first gradient of a buffer whole, whatever the dampening; the service that of a parameter without state.
    """
    run, groups = home.run, home.groups()
    if run is None or not run.step_count:
        return
    names = home.group_names if home.is_declared() else group_names(groups)
    for name, group in zip(names, groups, strict=True):
        if group["algorithm"] != "sgd" or not plain(group["momentum"]) or not plain(group["dampening"]):
            continue
        if run.groups.get(name, {"momentum": 0.0})["momentum"]:
            continue
        for parameter in group["params"]:
            entries = home.state.get(parameter, {})
            if "momentum_buffer" in entries and not torch.any(entries["momentum_buffer"]):
                del entries["momentum_buffer"]
