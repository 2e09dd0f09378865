"""The text that every example learns: the bytes of this repository's own sources and documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

FOLDERS = ("src", "kernels", "test", "examples", "docs")
HELD_OUT = 0.1


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes to be judged on, uint8; ``files`` is how many sources they come from."""

    train: torch.Tensor
    validation: torch.Tensor
    files: int


def read_corpus(root: Path) -> Corpus:
    """The last tenth of every file is held out, so that both parts have the same kinds of text."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*")) if _is_source(path)]
    texts = [path.read_bytes() for path in paths]
    cuts = [int(len(text) * (1 - HELD_OUT)) for text in texts]
    parts = (
        b"".join(text[:cut] for text, cut in zip(texts, cuts, strict=True)),
        b"".join(text[cut:] for text, cut in zip(texts, cuts, strict=True)),
    )
    train, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return Corpus(train, validation, len(texts))


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """The ``length`` bytes from each start on, as int64 [starts, length]."""
    return text[starts[:, None] + torch.arange(length)].long()


def random_windows(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    return windows(text, torch.randint(len(text) - length, (count,), generator=generator), length)


def even_windows(text: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """The same for every evaluation of every run: spread evenly over the text."""
    return windows(text, torch.linspace(0, len(text) - length, count).long(), length)


def _is_source(path: Path) -> bool:
    return path.suffix in (".ts", ".md", ".py") and not path.name.endswith(".d.ts") and path.is_file()
