"""S_max of QK-clip: for every query head the largest softmax input, after scale and mask, over the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode

# Query rows at a time: the logits of a block are all that is ever in memory.
_BLOCK_ROWS = 512

Call = Callable[..., Any]
Adjust = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Newer than the oldest torch that this package works with.
_AUX_REQUEST: Any = getattr(torch.nn.attention.flex_attention, "AuxRequest", None)


class MaxLogits:
    """Measures the largest logit of each query head while the model runs; give it to the optimizer as ``max_logits``.

    Three ways, by who computes the attention; ``name`` is that of the attention in ``attentions``:

    - ``watch({name: module})``: modules that call ``F.scaled_dot_product_attention`` need no change;
    - ``max_logits.scaled_dot_product_attention(name, q, k, v, …)`` or ``max_logits.flex_attention(name, …)`` in place of torch's;
    - ``max_logits.record(name, q, k, …)``: one line beside an attention of your own.

    Logits of a forward pass without gradients (validation) do not count. The maximum is taken over all forward passes until the
    step; then it begins anew. Measuring costs the product of queries and keys once more (flex_attention: nothing), which
    ``every`` limits to every n-th step: a step without logits is not clipped.
    """

    def __init__(self, *, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, at least 1")
        self._every = every
        self._steps = 0
        self._largest: dict[str, torch.Tensor] = {}

    @property
    def measuring(self) -> bool:
        """Whether this step's logits are wanted, and this is a forward pass that counts."""
        return torch.is_grad_enabled() and self._steps % self._every == 0

    def values(self) -> dict[str, list[float]]:
        """{attention: the largest logit of each query head} since the last step, as a ``step`` frame takes it."""
        return {name: largest.tolist() for name, largest in self._largest.items()}

    def reading(self) -> Callable[[], dict[str, list[float]]] | None:
        """``values`` of now without waiting for a GPU, which what it returns does; None if nothing was measured."""
        if not self._largest:
            return None
        host = {name: _on_its_way(largest) for name, largest in self._largest.items()}
        return lambda: {name: take().tolist() for name, take in host.items()}

    def reset(self, steps: int) -> None:
        """So many steps were taken, and what is measured from now on is of the next one. The optimizer calls it."""
        self._steps = steps
        self._largest.clear()

    def all_reduce(self, group: Any = None) -> None:
        """Takes the maximum over the ranks of a process group: before ``step()``, on every rank."""
        for name in sorted(self._largest):
            torch.distributed.all_reduce(self._largest[name], torch.distributed.ReduceOp.MAX, group)

    def record(
        self,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> None:
        """Records the logits of ``query`` [..., heads, queries, dim] and ``key`` [..., key heads, keys, dim].

        ``scale`` (default 1/sqrt(dim)), ``is_causal`` and ``attn_mask`` are those of ``F.scaled_dot_product_attention``. Fewer key
        heads than query heads are grouped-query attention.
        """
        if self.measuring:
            with torch.no_grad():
                adjust = _Masked(is_causal, attn_mask)
                self._take(name, _largest_logits(query.detach(), key.detach(), scale, adjust))

    def scaled_dot_product_attention(
        self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """``F.scaled_dot_product_attention``, recorded."""
        self._record_call(name, query, key, value, *args, **kwargs)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def flex_attention(
        self,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        attend: Call = flex_attention,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``flex_attention``, recorded, with what ``score_mod`` makes of the scores: a soft cap in it is part of them.

        ``attend``: a compiled flex_attention. On a GPU it knows the largest score of every row itself.
        """
        if self.measuring and query.is_cuda and _AUX_REQUEST is not None:  # pragma: no cover - needs a GPU
            output, auxiliary = attend(query, key, value, **kwargs, return_aux=_AUX_REQUEST(max_scores=True))
            with torch.no_grad():
                self._take(name, auxiliary.max_scores.detach().amax(dim=(0, 2)).float())
        else:
            if self.measuring:
                adjust = _FlexScores(kwargs.get("score_mod"), kwargs.get("block_mask"))
                with torch.no_grad():
                    self._take(name, _largest_logits(query.detach(), key.detach(), kwargs.get("scale"), adjust))
            output = attend(query, key, value, **kwargs)
        attended: torch.Tensor = output
        return attended

    def watch(self, attentions: Mapping[str, torch.nn.Module]) -> None:
        """Records what these modules give to ``F.scaled_dot_product_attention``, for as long as they live."""
        for name, module in attentions.items():
            mode = _Watching(self, name)

            def enter(_module: torch.nn.Module, _inputs: Any, mode: _Watching = mode) -> None:
                mode.__enter__()  # type: ignore[no-untyped-call]

            def leave(_module: torch.nn.Module, _inputs: Any, _output: Any, mode: _Watching = mode) -> None:
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)

    def _record_call(
        self,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.record(name, query, key, scale=scale, is_causal=is_causal, attn_mask=attn_mask)

    def _take(self, name: str, largest: torch.Tensor) -> None:
        before = self._largest.get(name)
        self._largest[name] = largest if before is None else torch.maximum(before, largest.to(before.device))


class _Watching(TorchFunctionMode):
    """Between the hooks of one module: its calls of torch pass through here."""

    def __init__(self, max_logits: MaxLogits, name: str) -> None:
        super().__init__()
        self._max_logits = max_logits
        self._name = name

    def __torch_function__(self, func: Call, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._max_logits._record_call(self._name, *args, **kwargs)
        return func(*args, **kwargs)


def _on_its_way(largest: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A copy in host memory, and what waits for it."""
    if largest.is_cuda:  # pragma: no cover - needs a GPU
        return _from_gpu(largest)
    copied = largest.clone()
    return lambda: copied


def _from_gpu(largest: torch.Tensor) -> Callable[[], torch.Tensor]:  # pragma: no cover - needs a GPU
    # `to` would wait; into page-locked memory the copy is one more piece of work for the stream.
    pinned = torch.empty(largest.shape, dtype=largest.dtype, device="cpu", pin_memory=True)
    pinned.copy_(largest, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(largest.device))

    def arrived() -> torch.Tensor:
        event.synchronize()
        return pinned

    return arrived


def _largest_logits(query: torch.Tensor, key: torch.Tensor, scale: float | None, adjust: Adjust) -> torch.Tensor:
    """float32, one for each query head. ``adjust`` puts mask and bias into a block of logits."""
    heads, queries, dim = query.shape[-3:]
    if key.shape[-3] != heads:
        key = key.repeat_interleave(heads // key.shape[-3], dim=-3)
    factor = 1 / math.sqrt(dim) if scale is None else scale
    largest = torch.full((heads,), -math.inf, device=query.device)
    for first in range(0, queries, _BLOCK_ROWS):
        rows = torch.arange(first, min(first + _BLOCK_ROWS, queries), device=query.device)
        logits = adjust((query[..., rows, :] @ key.transpose(-2, -1)).float() * factor, rows)
        largest = torch.maximum(largest, logits.movedim(-3, 0).reshape(heads, -1).amax(dim=1))
    return largest


class _Masked:
    """``is_causal`` and ``attn_mask`` of ``F.scaled_dot_product_attention``."""

    def __init__(self, is_causal: bool, attn_mask: torch.Tensor | None) -> None:
        self._is_causal = is_causal
        self._mask = attn_mask

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self._is_causal:
            seen = torch.arange(logits.shape[-1], device=logits.device) <= rows[:, None]
            logits = logits.masked_fill(~seen, -math.inf)
        if self._mask is None:
            return logits
        mask = self._mask if self._mask.shape[-2] == 1 else self._mask[..., rows, :]
        return logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask


class _FlexScores:
    """``score_mod`` and ``block_mask`` of ``flex_attention``: functions of indices, which broadcast over a block."""

    def __init__(self, score_mod: Call | None, block_mask: Any) -> None:
        self._score_mod = score_mod
        self._mask_mod: Call | None = None if block_mask is None else block_mask.mask_mod

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        batch, heads, _, keys = logits.shape
        device = logits.device
        indices = (
            torch.arange(batch, device=device)[:, None, None, None],
            torch.arange(heads, device=device)[:, None, None],
            rows[:, None],
            torch.arange(keys, device=device),
        )
        if self._score_mod is not None:
            logits = self._score_mod(logits, *indices)
        return logits if self._mask_mod is None else logits.masked_fill(~self._mask_mod(*indices), -math.inf)
