"""Whether tensors are what they were, without a copy of them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ..shards import local

Fingerprint = tuple[str, tuple[int, ...], bytes]


def on_host(value: Any) -> torch.Tensor:
    """A tensor or a number in host memory, in C order, whatever the default device is; of a sharded one what is on this rank."""
    if type(value) is torch.Tensor and value.is_cpu and value.is_contiguous() and not value.requires_grad:
        return value
    tensor = local(value.detach()) if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
    return tensor.cpu().contiguous()


def fingerprint(value: Any) -> Fingerprint:
    """dtype, shape and SHA-256 of the elements of a tensor or a number, wherever it is, or of None."""
    if value is None:
        # torch's SGD writes it for a buffer that there is none of.
        return "None", (), b""
    tensor = on_host(value)
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(_elements(tensor)).digest()


def same_bits(one: Any, other: Any) -> bool:
    """Whether two tensors or numbers have the same dtype, shape and bits: NaN is what it was, -0.0 is not 0.0."""
    one, other = on_host(one), on_host(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # A view of no elements cannot be cast: a rank may have an empty shard.
    return one.numel() == 0 or bool(memoryview(_elements(one)).cast("B") == memoryview(_elements(other)).cast("B"))


def _elements(tensor: torch.Tensor) -> Any:
    """The elements as a buffer."""
    # numpy has no bfloat16.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
