"""Whether tensors are what they were, without a copy of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

Fingerprint = tuple[str, tuple[int, ...], bytes]


def on_host(value: Any) -> torch.Tensor:
    """A tensor or a number in host memory, in C order, whatever the default device is."""
    tensor = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
    return tensor.cpu().contiguous()


def fingerprint(value: Any) -> Fingerprint:
    """dtype, shape and SHA-256 of the elements of a tensor or a number, wherever it is, or of None."""
    if value is None:
        # torch's SGD writes it for a buffer that there is none of.
        return "None", (), b""
    tensor = on_host(value)
    # numpy has no bfloat16.
    elements = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(elements.numpy().data).digest()


def content_digest(state: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """One digest of the state of some parameters, each with its name; the order of the entries of one does not count."""
    whole = hashlib.sha256()
    for parameter, entries in state:
        for name in sorted(entries):
            whole.update(repr((parameter, name, *fingerprint(entries[name]))).encode())
    return whole.hexdigest()
