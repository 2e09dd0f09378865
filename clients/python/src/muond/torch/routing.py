"""Which parameters are Muon's, by name and shape: the rules of docs/algorithms.md, "Who gets Muon"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Route = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Routed:
    """Where a parameter goes and why, in a few words; ``matrices`` is the layout Muon needs beyond two dimensions."""

    route: Route
    why: str
    matrices: Literal["flatten", "batch"] | None = None


@dataclass(frozen=True)
class NameRule:
    """A name that decides."""

    name: str
    """A regular expression, looked for anywhere in the name, upper and lower case alike."""
    route: Route
    why: str


# Words are whole parts of a name between dots or underscores; a head is looked for at the end of the name, because
# `attention.output` is none.
NAME_RULES: Sequence[NameRule] = (
    NameRule(r"(^|[._])(bias|biases)$", "adamw", "bias"),
    NameRule(
        r"(^|[._])(embed|embeds|embeddings?|embed_tokens|wte|wpe|tok_embeddings|pos_emb|cls_token|patch_embed)([._\d]|$)",
        "adamw",
        "embedding",
    ),
    NameRule(
        r"(^|\.)(lm_head|head|heads|embed_out|output_layer|unembed|unembedding|classifier|score)\.?\d*(\.weight)?$",
        "adamw",
        "head",
    ),
    NameRule(r"^(model\.|transformer\.)?(output|fc)(\.weight)?$", "adamw", "head"),
    NameRule(
        r"(^|[._])((\w*_)?(layer|rms|batch|group)?norms?|ln|bn)(_?(\d+|f|q|k|pre|post|final))?(\.weight)?$",
        "adamw",
        "norm",
    ),
)

_CONVOLUTION = re.compile(r"(^|[._])(\w*conv\w*|downsample|stem)([._]|$)", re.IGNORECASE | re.ASCII)
_EXPERTS = re.compile(r"(^|[._])(experts?|moe)([._]|$)", re.IGNORECASE | re.ASCII)
# Kernels are rarely wider than 15, and no side of a hidden matrix is as narrow.
_WIDEST_KERNEL = 15
# Pictures have one to four channels.
_MOST_CHANNELS = 4

Shape = tuple[int, ...]


def route_all(parameters: Sequence[tuple[str, Shape]], rules: Sequence[NameRule] = ()) -> list[Routed]:
    """The first rule whose name matches decides, the caller's before NAME_RULES; then the shape.

    Fewer than two dimensions above 1 go to AdamW, two are a matrix for Muon, more are a convolution (flatten) or matrices side
    by side (batch). A model that begins with a convolution over at most four channels reads its input there: AdamW's.
    """
    first = next((parameter for parameter in parameters if len(parameter[1]) >= 2), None)
    return [_route(parameter, [*rules, *NAME_RULES], is_first=parameter is first) for parameter in parameters]


def _route(parameter: tuple[str, Shape], rules: Sequence[NameRule], *, is_first: bool) -> Routed:
    name, shape = parameter
    for rule in rules:
        if re.search(rule.name, name, re.IGNORECASE | re.ASCII):
            layout = _layout(name, shape)[1] if rule.route == "muon" and len(shape) > 2 else None
            return Routed(rule.route, rule.why, layout)
    if is_first and _is_convolution(name, shape) and shape[1] <= _MOST_CHANNELS:
        return Routed("adamw", "first convolution")
    if sum(size > 1 for size in shape) < 2:
        return Routed("adamw", "below rank 2")
    if len(shape) > 2:
        return Routed("muon", *_layout(name, shape))
    return Routed("muon", "matrix")


def _layout(name: str, shape: Shape) -> tuple[str, Literal["flatten", "batch"]]:
    if _EXPERTS.search(name):
        return "experts", "batch"
    if _is_convolution(name, shape):
        return "convolution", "flatten"
    return "matrices side by side", "batch"


def _is_convolution(name: str, shape: Shape) -> bool:
    """By its name, or because every dimension after the second is as narrow as a kernel."""
    return len(shape) > 2 and (
        _CONVOLUTION.search(name) is not None or all(size <= _WIDEST_KERNEL for size in shape[2:])
    )
