"""Groups that name a published recipe of the service instead of values (docs/algorithms.md, "Presets")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_preset(group: Mapping[str, Any], presets: Mapping[str, Any]) -> dict[str, Any]:
    """The group with what its preset says and it does not itself; ``presets`` are those of the service's capabilities.

    The group's algorithm, else the preset's own. Raises ValueError, naming what there is.
    """
    name = group["preset"]
    if name not in presets:
        raise ValueError(f"a param_group has the preset {name!r}, the service has {', '.join(sorted(presets))}")
    preset = presets[name]
    algorithm = group.get("algorithm", preset["algorithm"])
    recipes = preset["hyperparameters"]
    if algorithm not in recipes:
        raise ValueError(f"the preset '{name}' has no values for {algorithm!r}, only for {', '.join(recipes)}")
    values = {key: entry["value"] for key, entry in recipes[algorithm].items()}
    if "ns_coefficients" in group and "ns_steps" in values:
        # The number of steps is that of the preset's own coefficients.
        values["ns_steps"] = None
    return {**values, **group, "algorithm": algorithm}
