"""What a state_dict holds of a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...run import Run

if TYPE_CHECKING:
    from ..home import Home


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without garbage collection: it would look through the whole program again and again while thousands of tensors are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def saved(home: Home, *, tensors: bool = False) -> tuple[dict[torch.Tensor, dict[str, Any]], dict[str, Any] | None]:
    """What a state_dict holds: the entries of each parameter, and the token that says what they are of.

    ``tensors``: the state itself, also where the settings say ``checkpoint``.
    """
    own = home.state.own()
    at = home.readable()
    if at is None:
        return _together(home.state.contents(), own), None
    if home.run is not None:
        home.carry_out_alone()
    # It may be another one by now.
    run = home.run or at
    token: dict[str, Any] = {"version": 1, "run": run.name, "step": run.step_count, "digest": run.digest}
    if home.settings.state == "checkpoint" and not tensors and isinstance(run, Run):
        # Its tag keeps it for as long as the dictionary may be loaded.
        token["checkpoint"] = run.checkpoint(f"state_dict.{run.step_count}").id
        return own, token
    return _together(home.read(), own), token


def _together(state: Mapping[torch.Tensor, Mapping[str, Any]], own: Mapping[Any, Any]) -> dict[Any, Any]:
    joined: dict[Any, Any] = {parameter: dict(entries) for parameter, entries in state.items() if entries}
    for key, entries in own.items():
        joined[key] = {**joined.get(key, {}), **entries} if isinstance(key, torch.Tensor) else entries
    return joined
