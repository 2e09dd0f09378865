"""A GPT-2 of any size with random weights, and batches of random tokens: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each [batch, heads, length, dim]."""
        batch, length, width = x.shape
        parts = self.c_attn(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return tuple(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.c_proj(attended.transpose(1, 2).reshape(x.shape))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        out: torch.Tensor = x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return out


class Gpt(nn.Module):
    """Tied embeddings; the defaults are GPT-2 with 124 million parameters."""

    def __init__(
        self, vocabulary: int = 50257, width: int = 768, heads: int = 12, layers: int = 12, context: int = 1024
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting every token but the first; ``tokens`` [batch, length]."""
        x, wanted = tokens[:, :-1], tokens[:, 1:]
        hidden = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.h:
            hidden = block(hidden)
        return F.cross_entropy(self.lm_head(self.ln_f(hidden)).flatten(0, 1), wanted.flatten())


def gpt(device: torch.device, **sizes: int) -> Gpt:
    """The same weights for the same sizes, on any device."""
    torch.manual_seed(0)
    return Gpt(**sizes).to(device)


def batches(text: bytes, size: int, length: int, device: torch.device, seed: int = 1) -> Iterator[torch.Tensor]:
    """Random windows of a text, a byte a token; the same for a seed."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (size,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts.tolist()]).to(device)
