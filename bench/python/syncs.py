"""Shows that no code waits for the GPU: a wait is an error, and a busy GPU makes a wait visible in the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def syncs_are_errors(device: torch.device) -> Iterator[None]:
    """Within the block every wait for a stream raises, in every thread."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def a_cpu_copy_raises(device: torch.device) -> bool:
    """Whether a wait raises in a hook of the backward pass too: here a copy to the CPU, as a careless hook makes it."""
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
    """Has the GPU do nothing for about half a second. The event behind that is done only once somebody waited."""
    torch.cuda._sleep(1_000_000_000)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
