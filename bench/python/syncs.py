"""Proof that nothing waits for the GPU: what would wait is an error, and the GPU is kept busy so that waiting shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def syncs_are_errors(device: torch.device) -> Iterator[None]:
    """Whatever waits for a stream raises, in every thread."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def a_cpu_copy_raises(device: torch.device) -> bool:
    """Whether that holds where it is relied on: in a hook of the backward pass, for the copy that a careless one would make."""
    weights = torch.ones(8, device=device, requires_grad=True)

    def careless(tensor: torch.Tensor) -> None:
        assert tensor.grad is not None
        tensor.grad.cpu()

    weights.register_post_accumulate_grad_hook(careless)
    loss = weights.sum()
    try:
        with syncs_are_errors(device):
            loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return "synchronizing" in str(error)
    return False


def keep_busy(device: torch.device) -> torch.cuda.Event:
    """Half a second or so of nothing, and an event behind it: whoever waits for the GPU finds it done."""
    torch.cuda._sleep(1_000_000_000)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
