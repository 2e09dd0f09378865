"""The name of a parameter."""

from __future__ import annotations

_COMPILED = "_orig_mod."


def plain_name(name: str) -> str:
    """As the model itself has it: torch.compile puts a module of its own around one, which a run and its rules must not see."""
    return name.replace(_COMPILED, "")
