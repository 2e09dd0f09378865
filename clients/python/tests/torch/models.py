"""Small models, and text that is always there: this repository's documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from service import ROOT


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return tuple(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Gpt(nn.Module):
    """A byte-level GPT with tied embeddings."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2, context: int = 32) -> None:
        super().__init__()
        self.wte = nn.Embedding(256, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.05)

    def forward(self, bytes_in: torch.Tensor) -> torch.Tensor:
        x = self.wte(bytes_in) + self.wpe(torch.arange(bytes_in.shape[1]))
        for block in self.h:
            x = block(x)
        logits: torch.Tensor = self.lm_head(self.ln_f(x))
        return logits

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def gpt(**sizes: int) -> Gpt:
    torch.manual_seed(0)
    return Gpt(**sizes)


def batches(seed: int = 1, size: int = 8, length: int = 33) -> Iterator[torch.Tensor]:
    """Random windows of the text, the same for a seed."""
    text = torch.frombuffer(bytearray((ROOT / "docs" / "algorithms.md").read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (size,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts.tolist()])


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two matrices and two biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)).to(dtype)


def examples(step: int, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 12, generator=generator), torch.randint(0, 6, (count,), generator=generator)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x, y = examples(step)
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(x.to(dtype)).float(), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 1) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2]


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest relative Frobenius distance of any parameter."""
    pairs = [
        (a.detach().double(), b.detach().double()) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    ]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


Make = Callable[[nn.Module], torch.optim.Optimizer]
