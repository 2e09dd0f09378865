"""Which parameter each state of a state_dict belongs to: torch's own matching, and by name where there are names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from ..feedback import KEY as ERROR_FEEDBACK
from ..hyperparameters import FIXED
from ..names import plain_name
from ..slots import LAYOUT_KEYS
from .kinds import state_names

TOKEN = "muond"
"""The key of a state_dict that says which run, step and digest it has."""

# What a run can be given in another form than it keeps: the service converts it.
_CONVERTED = "momentum_form"
# Keys of a group that say which parameters these are, how they travel or how torch computes: this optimizer's hold.
_OURS = frozenset(
    {
        *("params", "param_names", "name", "algorithm", "preset", "layouts", *LAYOUT_KEYS, _CONVERTED),
        *("gradient_dtype", "update_dtype", "foreach", "fused", "capturable", "differentiable"),
    }
)


@dataclass(frozen=True)
class Loaded:
    """A state_dict, matched: nothing of the optimizer has changed for it."""

    groups: list[dict[str, Any]]
    """The param_groups as they are to be."""
    state: dict[torch.Tensor, dict[str, Any]]
    """The service's entries of each parameter that has some."""
    own: dict[Any, Any]
    """The program's own entries and keys."""


def match(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Loaded:
    """Holds a state_dict against param_groups. Raises ValueError for what does not match, with torch's words where it has some."""
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"it has {len(saved)} param_groups, this optimizer has {len(groups)}"
        )
    merged = [_merged(ours, theirs) for ours, theirs in zip(groups, saved, strict=True)]
    parameter_of: dict[Any, torch.Tensor] = {}
    factor_of: dict[torch.Tensor, float] = {}
    for number, (ours, theirs, group) in enumerate(zip(groups, saved, merged, strict=True)):
        matched = _match_group(number, ours, theirs)
        parameter_of.update(zip(theirs["params"], matched, strict=True))
        factor_of.update(dict.fromkeys(matched, _momentum_factor(ours, theirs, group)))
    state, own = _share_out(state_dict["state"], parameter_of, _group_of(groups))
    for parameter, entries in state.items():
        if factor_of[parameter] != 1.0 and "momentum_buffer" in entries:
            entries["momentum_buffer"] = (entries["momentum_buffer"].double() * factor_of[parameter]).float()
    return Loaded(merged, state, own)


def _momentum_factor(ours: Mapping[str, Any], theirs: Mapping[str, Any], merged: Mapping[str, Any]) -> float:
    """From the form of the dictionary's momentum buffers to ours: with the dictionary's μ, an average is 1 - μ times a sum."""
    # A dictionary of torch's own Muon does not say: its buffer is an average.
    form = theirs.get(_CONVERTED) or "ema"
    if _CONVERTED not in ours or form == ours[_CONVERTED]:
        return 1.0
    share = 1.0 - float(merged["momentum"])
    return share if form == "heavy_ball" else 1.0 / share


def _match_group(number: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Our parameters in the order of the dictionary's ids."""
    parameters, ids = ours["params"], theirs["params"]
    if len(parameters) != len(ids):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
            f"group {number} has {len(ids)} parameters, this optimizer's has {len(parameters)}"
        )
    names, known = _names(theirs), _names(ours)
    if names is None or known is None or names == known:
        return list(parameters)
    if sorted(names) != sorted(known):
        raise ValueError(
            f"group {number} of the state dict has {_some(set(names) - set(known))}, this optimizer's has "
            f"{_some(set(known) - set(names))}: rename them in a load_state_dict_pre_hook, or take 'param_names' out to match by order"
        )
    by_name = dict(zip(known, parameters, strict=True))
    return [by_name[name] for name in names]


def _names(group: Mapping[str, Any]) -> list[str] | None:
    """Unique names of a group's parameters: its own, or ids that are names, as torch.distributed.checkpoint has them."""
    names = group.get("param_names")
    if names is None and all(isinstance(each, str) for each in group["params"]):
        names = group["params"]
    if names is None or len(names) != len(group["params"]):
        return None
    plain = [plain_name(name) for name in names]
    return plain if len(set(plain)) == len(plain) else None


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(f"'{name}'" for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _group_of(groups: Sequence[Mapping[str, Any]]) -> dict[torch.Tensor, Mapping[str, Any]]:
    return {parameter: group for group in groups for parameter in group["params"]}


def _share_out(
    state: Mapping[Any, Any],
    parameter_of: Mapping[Any, torch.Tensor],
    group_of: Mapping[torch.Tensor, Mapping[str, Any]],
) -> tuple[dict[torch.Tensor, dict[str, Any]], dict[Any, Any]]:
    kinds = {type(each) for each in parameter_of}
    found: dict[torch.Tensor, dict[str, Any]] = {}
    own: dict[Any, Any] = {}
    for key, entries in state.items():
        parameter = parameter_of.get(key)
        if parameter is None:
            if type(key) in kinds and isinstance(entries, Mapping):
                raise ValueError(f"the state dict has a state of parameter {key!r}, which none of its param_groups has")
            # torch keeps what is not of a parameter as it is.
            own[key] = entries
            continue
        names = state_names(group_of[parameter])
        service = {name: value for name, value in entries.items() if name in names}
        mine = {name: _beside(parameter, name, value) for name, value in entries.items() if name not in names}
        if service:
            found[parameter] = service
        if mine:
            own[parameter] = mine
    return found, own


def _beside(parameter: torch.Tensor, name: str, value: Any) -> Any:
    """As torch casts what it loads: to the parameter's device, and floating point numbers to its dtype, but for what is float32."""
    if isinstance(value, torch.Tensor):
        dtype = parameter.dtype if value.is_floating_point() and name != ERROR_FEEDBACK else value.dtype
        return value.detach().to(device=parameter.device, dtype=dtype, copy=True)
    return deepcopy(value)


def _check_decay(algorithm: str, theirs: Mapping[str, Any]) -> None:
    """The same number must not mean another optimizer."""
    decay = theirs["weight_decay"]
    if algorithm == "sgd" and "algorithm" not in theirs:
        raise ValueError(
            f"weight_decay is {decay} in a state dict of torch.optim.SGD, which adds it to the gradient; the service's sgd takes it "
            "from the weights, as AdamW does: set it to 0 in the state dict"
        )
    if algorithm == "adam" and theirs.get("decoupled_weight_decay"):
        raise ValueError(f"weight_decay {decay} of the state dict is decoupled, as in AdamW: load it into an AdamW")


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary's group, with the keys that only this package has where it says nothing of them."""
    algorithm = ours["algorithm"]
    if theirs.get("algorithm", algorithm) != algorithm:
        raise ValueError(f"a group of the state dict is {theirs['algorithm']}, this optimizer's is {algorithm}")
    if theirs.get("weight_decay"):
        _check_decay(algorithm, theirs)
    saved = deepcopy({key: value for key, value in theirs.items() if key not in _OURS})
    kept = {key: value for key, value in ours.items() if key not in saved}
    for key in FIXED - {_CONVERTED}:
        if key in saved and key in ours and saved[key] != ours[key]:
            raise ValueError(
                f"{key} is {saved[key]!r} in the state dict and {ours[key]!r} in this optimizer, and is part of the state: "
                f"make the optimizer with {key}={saved[key]!r}"
            )
    return {**kept, **saved}
