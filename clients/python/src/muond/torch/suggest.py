"""Sharing a model out between Muon and AdamW, and saying why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .names import plain_name
from .routing import NameRule, Routed, route_all

# What a module is says more than what it is called.
_MODULES: Sequence[tuple[tuple[type[nn.Module], ...], str]] = (
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
    (
        (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm, nn.LocalResponseNorm),
        "norm",
    ),
)


@dataclass(frozen=True)
class Suggestion(Sequence[Mapping[str, Any]]):
    """Groups as ``Optimizer(…, groups=)`` takes them, and in ``table`` every parameter with its reason."""

    groups: tuple[dict[str, Any], ...]
    reasons: Mapping[str, str]
    table: str

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.groups)

    def __str__(self) -> str:
        return self.table


def suggest(
    model: nn.Module,
    *,
    rules: Sequence[NameRule] = (),
    preset: str | None = None,
    muon: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Mapping[str, Any]] | None = None,
    quiet: bool = False,
) -> Suggestion:
    """Embeddings, heads, norms, biases and anything below rank 2 to AdamW, everything else to Muon; prints why.

    A parameter tied to an embedding is one. ``rules`` are looked at first. ``preset`` is a published recipe for both groups.
    ``muon`` and ``adamw`` are keys of their groups, such as ``{"lr": 0.02}`` or ``{"algorithm": "muonclip"}``; they win over
    the preset's. ``layouts``: {name: {``split``, ``heads`` or ``matrices``}}; a parameter
    that has one goes to Muon. It decides by names, shapes and modules, so look at the table.
    """
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
    given = dict(layouts or {})
    for name in given:
        if name not in dict(named):
            raise ValueError(f"layouts has '{name}', which is the name of no parameter")
    routed = dict(
        zip(
            (name for name, _ in named),
            # The rules know the names of a model, not those of what is around it.
            route_all([(n.removeprefix(_wrapper(model)), tuple(p.shape)) for n, p in named], rules),
            strict=True,
        )
    )
    known = _by_module(model)
    for name, parameter in named:
        own_rule = any(rule.why == routed[name].why for rule in rules)
        if name in given:
            routed[name] = Routed("muon", "layout as given")
        elif parameter in known and not own_rule:
            routed[name] = known[parameter]
    fused = _fused(model, routed)
    layout_of = {**{name: {"matrices": r.matrices} for name, r in routed.items() if r.matrices}, **fused, **given}
    first = {"algorithm": "muon"} if preset is None else {"preset": preset}
    groups = (
        _group("muon", {**first, **(muon or {})}, named, routed, layout_of),
        _group("adamw", {**first, "algorithm": "adamw", **(adamw or {})}, named, routed, {}),
    )
    suggestion = Suggestion(
        tuple(group for group in groups if group["params"]),
        {name: r.why for name, r in routed.items()},
        _table(named, routed, layout_of),
    )
    if not quiet:
        print(suggestion)  # noqa: T201 - what it was called for
    return suggestion


def _wrapper(model: nn.Module) -> str:
    """What a wrapper for data parallel training puts before every name."""
    inner = getattr(model, "_orig_mod", model)
    return "module." if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else ""


def _by_module(model: nn.Module) -> dict[nn.Parameter, Routed]:
    """Tied weights are found by every module that has them, and one embedding among those decides."""
    known: dict[nn.Parameter, Routed] = {}
    for module in model.modules():
        for types, why in _MODULES:
            if isinstance(module, types):
                known.update({parameter: Routed("adamw", why) for parameter in module.parameters(recurse=False)})
    return known


def _fused(model: nn.Module, routed: Mapping[str, Routed]) -> dict[str, dict[str, Any]]:
    """The one fused matrix whose parts are known: ``in_proj_weight`` of torch's MultiheadAttention is query, key and value."""
    fused: dict[str, dict[str, Any]] = {}
    for prefix, module in model.named_modules():
        name = plain_name(f"{prefix}.in_proj_weight".lstrip("."))
        if isinstance(module, nn.MultiheadAttention) and name in routed and routed[name].route == "muon":
            fused[name] = {"split": [module.embed_dim] * 3}
    return fused


def _group(
    route: str,
    keys: Mapping[str, Any],
    named: Sequence[tuple[str, torch.Tensor]],
    routed: Mapping[str, Routed],
    layouts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    params = [pair for pair in named if routed[pair[0]].route == route]
    own = {name: dict(layouts[name]) for name, _ in params if name in layouts}
    return {"name": route, **keys, "params": params, **({"layouts": own} if own else {})}


def _table(
    named: Sequence[tuple[str, torch.Tensor]], routed: Mapping[str, Routed], layouts: Mapping[str, Mapping[str, Any]]
) -> str:
    rows = [("parameter", "shape", "group", "layout", "why")]
    for name, parameter in named:
        layout = ", ".join(f"{key} {value}" for key, value in layouts.get(name, {}).items())
        shape = "x".join(str(size) for size in parameter.shape) or "scalar"
        why = routed[name].why if parameter.requires_grad else f"{routed[name].why}, frozen"
        rows.append((name, shape, routed[name].route, layout, why))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
