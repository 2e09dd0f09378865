"""A byte-level GPT: pre-norm blocks without biases, and a head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BYTES = 256


@dataclass(frozen=True)
class Size:
    """``context`` bytes are read at a time; ``heads`` must divide ``width``."""

    width: int
    depth: int
    heads: int
    context: int


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query, self.key, self.value, self.out = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(size.width)
        self.attention = Attention(size)
        self.norm_2 = nn.RMSNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        hidden: torch.Tensor = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + hidden


class Gpt(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.token_embedding = nn.Embedding(BYTES, size.width)
        self.position_embedding = nn.Embedding(size.context, size.width)
        self.h = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.RMSNorm(size.width)
        self.lm_head = nn.Linear(size.width, BYTES, bias=False)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats per byte over the windows [batch, context + 1]: every byte from those before it."""
        read, guess = window[:, :-1], window[:, 1:]
        x = self.token_embedding(read) + self.position_embedding.weight[: read.shape[1]]
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), guess.flatten())

    def attentions(self, threshold: float) -> list[dict[str, Any]]:
        """As QK-clip takes them: the rows of each layer's queries and keys, by parameter name."""
        return [
            {
                "name": f"h.{layer}",
                "query_heads": self.size.heads,
                "head_dim": self.size.width // self.size.heads,
                "query": f"h.{layer}.attention.query.weight",
                "key": f"h.{layer}.attention.key.weight",
                "threshold": threshold,
            }
            for layer in range(self.size.depth)
        ]


def seeded_gpt(size: Size, seed: int) -> Gpt:
    torch.manual_seed(seed)
    return Gpt(size)
