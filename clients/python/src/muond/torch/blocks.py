"""Tensors in blocks (docs/protocol.md), in torch: on the device where the tensor is."""

from __future__ import annotations

import torch

from ..wire.dtype import BLOCKS, SCALE_BYTES, tensor_bytes


def encode(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The bytes (uint8) of float32 numbers in blocks: scale = bfloat16(max |x| / most), integer = round(x / scale)."""
    blocks = BLOCKS[dtype]
    flat = values.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % blocks.elements)).view(-1, blocks.elements)
    largest = padded.abs().amax(dim=1)
    # A float32 NaN has many patterns in bfloat16, one that is filled in has one.
    scales = (largest / blocks.most).to(torch.bfloat16).masked_fill_(~largest.isfinite(), float("nan"))
    wide = scales.float()[:, None]
    # Where the scale is 0 or NaN the integers are 0.
    quotients = torch.where(wide > 0, padded / wide, 0.0)
    integers = quotients.round_().clamp_(-blocks.most, blocks.most).to(torch.int8).view(torch.uint8)
    stored = integers if blocks.bits == 8 else (integers[:, ::2] & 15) | (integers[:, 1::2] << 4)
    data = torch.cat([scales.view(torch.uint8).view(-1, SCALE_BYTES), stored], dim=1)
    return data.view(-1)[: tensor_bytes(dtype, len(flat))]


def decode(data: torch.Tensor, dtype: str, elements: int) -> torch.Tensor:
    """So many elements as float32, exactly: integer · scale. A scale that is NaN or Inf makes its elements NaN or Inf."""
    blocks = BLOCKS[dtype]
    width = tensor_bytes(dtype, blocks.elements)
    count = -(-elements // blocks.elements)
    padded = torch.nn.functional.pad(data, (0, count * width - len(data))).view(count, width)
    scales = padded[:, :SCALE_BYTES].contiguous().view(torch.bfloat16).float()
    stored = padded[:, SCALE_BYTES:].contiguous().view(torch.int8)
    # Shifted up and down again, the lower four bits have the sign of their highest.
    integers = stored if blocks.bits == 8 else torch.stack([(stored << 4) >> 4, stored >> 4], dim=-1).view(count, -1)
    return (integers.float() * scales).view(-1)[:elements]
