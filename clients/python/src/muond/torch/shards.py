"""What of a parameter lies on this rank, where a trainer shards its model (FSDP2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Range = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """``ranges`` of the elements in C order that lie on this rank, the mesh of all ranks, and its dimension that shards.

    Of a mesh of two dimensions the other one, ``copies``, has the same shards several times (HSDP).
    """

    ranges: list[Range]
    mesh: Any
    dimension: int = 0
    copies: int | None = None


def shard_of(name: str, tensor: torch.Tensor) -> Shard | None:
    """The shard of a DTensor; None for a tensor that is whole. Raises ValueError for what cannot be sent as ranges."""
    # Looked for by name: torch.distributed takes a second to import, and nobody has these without it.
    if type(tensor).__name__ == "FlatParameter" or getattr(tensor, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter '{name}' is sharded by FullyShardedDataParallel, which hides where its elements are: use fully_shard (FSDP2)"
        )
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    kinds = [type(placement).__name__ for placement in placements]
    if mesh.ndim > 1 and kinds != ["Replicate", "Shard"]:
        raise ValueError(
            f"parameter '{name}' is on a mesh of {mesh.ndim} dimensions {mesh.mesh_dim_names or ''} as {list(placements)}: muond takes "
            "shards of one dimension, or of the second of two whose first replicates (fully_shard on a 1-D mesh or, for hybrid "
            "sharding, a 2-D one); tensor parallelism beside it is not possible"
        )
    if kinds[-1] != "Shard":
        raise ValueError(
            f"parameter '{name}' has the placement {placements[-1]!r}, expected Shard: {_REMEDY.get(kinds[-1], _OTHER)}"
        )
    (chunk,) = sharded.__create_chunk_list__()
    ranges = ranges_of(tuple(tensor.shape), tuple(chunk.offsets), tuple(chunk.sizes))
    return Shard(ranges, mesh, mesh.ndim - 1, 0 if mesh.ndim > 1 else None)


_REMEDY = {
    "Partial": "reduce it first, redistribute([Shard(0)])",
    "Replicate": "shard it (fully_shard), or keep it out of the mesh",
    "_StridedShard": "a strided shard is no run of rows: use fully_shard without tensor parallelism",
}
_OTHER = "redistribute([Shard(0)])"


def ranges_of(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> list[Range]:
    """The elements in C order of a block of a tensor, as ranges: one for rows, one for each row of columns."""
    if 0 in sizes:
        return []
    cut = max((d for d in range(len(shape)) if sizes[d] != shape[d]), default=-1)
    if cut < 0:
        return [(0, math.prod(shape))]
    inner = math.prod(shape[cut + 1 :])
    outer = [range(offsets[d], offsets[d] + sizes[d]) for d in range(cut)]
    ranges: list[Range] = []
    for place in itertools.product(*outer):
        row = 0
        for size, index in zip(shape, place, strict=False):
            row = row * size + index
        start = (row * shape[cut] + offsets[cut]) * inner
        ranges.append((start, start + sizes[cut] * inner))
    return ranges


def like_shard(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of a sharded parameter, sharded as that is."""
    from torch.distributed.tensor import DTensor

    sharded: Any = parameter
    (chunk,) = sharded.__create_chunk_list__()
    part = whole[tuple(slice(o, o + size) for o, size in zip(chunk.offsets, chunk.sizes, strict=True))]
    return DTensor.from_local(
        part.contiguous(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def whole_entries(entries: Mapping[str, Any], is_kept: bool) -> dict[str, Any]:
    """The state of a sharded parameter with whole tensors in host memory, where they are kept. A collective of all shards."""
    whole: dict[str, Any] = {}
    for name in sorted(entries):
        value = entries[name]
        if is_sharded(value):
            gathered = value.detach().full_tensor()
            value = gathered.cpu() if is_kept else None
        whole[name] = value
    return whole


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # By name, as above.
    return type(tensor).__name__ == "DTensor"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor that lie on this rank, in its own memory."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        part: torch.Tensor = sharded.to_local()
    return part
