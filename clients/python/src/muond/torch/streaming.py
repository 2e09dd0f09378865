"""Gradients that leave while the backward pass still runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle

from .slots import Slot


class Streaming:
    """Which gradients of the coming step were sent by hooks, and whether they are still what was sent.

    ``send(slot, gradient)`` is called by the thread of the backward pass, once per step and parameter.
    """

    def __init__(self, slots: list[Slot], passes: int, send: Callable[[Slot, torch.Tensor], None]) -> None:
        self._slots = slots
        self._passes = passes
        self._send = send
        self._lock = threading.Lock()
        self._seen: dict[int, int] = {}
        self._sent: dict[int, tuple[int, int]] = {}
        self._handles: dict[int, RemovableHandle] = {}

    def attach(self) -> None:
        """Hooks on every parameter that needs a gradient; again after a step, for those that were frozen before."""
        for slot in self._slots:
            if slot.index not in self._handles and slot.tensor.requires_grad:
                handle = slot.tensor.register_post_accumulate_grad_hook(self._hook(slot))  # type: ignore[no-untyped-call]
                self._handles[slot.index] = handle

    def detach(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def changed(self) -> list[str]:
        """Names of the parameters whose gradient is not what was sent any more."""
        return [s.name for s in self._slots if s.index in self._sent and _version(s.tensor.grad) != self._sent[s.index]]

    def reset(self) -> None:
        """The step is over, or its gradients are gone."""
        self._seen.clear()
        self._sent.clear()

    def _hook(self, slot: Slot) -> Callable[[torch.Tensor], None]:
        def hook(tensor: torch.Tensor) -> None:
            gradient = tensor.grad
            # Parameters on several GPUs have a thread each.
            with self._lock:
                seen = self._seen[slot.index] = self._seen.get(slot.index, 0) + 1
                if gradient is None or seen < self._passes:
                    return
                if slot.index in self._sent:
                    raise RuntimeError(
                        f"parameter '{slot.name}' has got another gradient after the one of this step was sent: backward passes "
                        f"before a step are {seen}, accumulation_steps is {self._passes}. (After a backward pass that failed, "
                        "call zero_grad() of the optimizer; with reentrant activation checkpointing use overlap=False.)"
                    )
                self._send(slot, gradient)
                self._sent[slot.index] = _version(gradient)

        return hook


def _version(gradient: torch.Tensor | None) -> tuple[int, int]:
    """A tensor's memory, and how often it was changed in place."""
    return (0, 0) if gradient is None else (gradient.data_ptr(), gradient._version)
