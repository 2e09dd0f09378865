"""The largest logit of each head, however the attention is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Attention, batches, gpt
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from muond.torch import MaxLogits, MuonClip, Optimizer, suggest
from service import Service


def tensors(heads: int = 4, key_heads: int = 4, queries: int = 7, keys: int = 7) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(5)
    q = torch.randn(3, heads, queries, 8, requires_grad=True)
    k, v = (torch.randn(3, key_heads, keys, 8, requires_grad=True) for _ in range(2))
    return q, k, v


def expected(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None = None, scale: float = 8**-0.5) -> list[float]:
    """By definition, in float64."""
    groups = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, dim=1).transpose(-2, -1) * scale
    logits = logits if bias is None else logits + bias
    return [float(v) for v in logits.detach().amax(dim=(0, 2, 3))]


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.zeros(queries, keys).masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)


CASES: dict[str, tuple[dict[str, int], dict[str, Any], Callable[[], torch.Tensor] | None, float]] = {
    "plain": ({}, {}, None, 8**-0.5),
    "scale": ({}, {"scale": 0.1}, None, 0.1),
    "causal": ({"queries": 6, "keys": 9}, {"is_causal": True}, lambda: causal(6, 9), 8**-0.5),
    "mask": ({}, {"attn_mask": causal(7, 7) == 0}, lambda: causal(7, 7), 8**-0.5),
    "bias": ({}, {"attn_mask": torch.arange(49.0).view(7, 7)}, lambda: torch.arange(49.0).view(7, 7), 8**-0.5),
    "one-row": (
        {},
        {"attn_mask": torch.tensor([[0.0] * 6 + [-torch.inf]])},
        lambda: torch.tensor([[0.0] * 6 + [-torch.inf]]),
        8**-0.5,
    ),
    "grouped": ({"key_heads": 2}, {"enable_gqa": True}, None, 8**-0.5),
    "long": ({"queries": 1300, "keys": 1300}, {"is_causal": True}, lambda: causal(1300, 1300), 8**-0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_the_largest_logit_after_scale_and_mask(case: str) -> None:
    sizes, options, bias, scale = CASES[case]
    q, k, v = tensors(**sizes)
    max_logits = MaxLogits()
    attended = max_logits.scaled_dot_product_attention("a", q, k, v, **options)
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(q, k, v, **options))
    assert max_logits.values()["a"] == pytest.approx(expected(q, k, bias() if bias else None, scale), rel=1e-5)


# That it is slow without torch.compile is no news here.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_its_masks_and_scores() -> None:
    # On the CPU torch has no backward pass for it.
    q, k, v = (tensor.detach() for tensor in tensors(queries=16, keys=16))
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 16, 16, device="cpu")
    max_logits = MaxLogits()
    attended = max_logits.flex_attention("a", q, k, v, block_mask=mask)
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert max_logits.values()["a"] == pytest.approx(expected(q, k, causal(16, 16)), rel=1e-5)
    max_logits.flex_attention(
        "c", q, k, v, block_mask=mask, score_mod=lambda score, b, h, i, j: score + h - (i - j) / 2
    )
    bias = causal(16, 16) + torch.arange(4)[:, None, None] - (torch.arange(16)[:, None] - torch.arange(16)) / 2
    assert max_logits.values().pop("c") == pytest.approx(expected(q, k, bias), rel=1e-5)
    max_logits._largest.pop("c")
    with torch.no_grad():
        again = max_logits.flex_attention("b", q, k, v, block_mask=mask)
    torch.testing.assert_close(again, attended.detach())
    assert set(max_logits.values()) == {"a"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_of_the_callers_own_is_called() -> None:
    q, k, v = (tensor.detach() for tensor in tensors(queries=16, keys=16))
    called: list[str] = []

    def attend(*args: Any, **options: Any) -> Any:
        called.append("compiled, say")
        return flex_attention(*args, **options)

    MaxLogits().flex_attention("a", q, k, v, attend=attend)
    assert called == ["compiled, say"]


def test_the_maximum_is_over_all_passes_until_the_step_and_not_over_validation() -> None:
    q, k, _ = tensors()
    max_logits = MaxLogits()
    for factor in (0.5, 2.0, 1.0):
        max_logits.record("a", q * factor, k)
    with torch.no_grad():
        max_logits.record("a", q * 100, k)
    assert max_logits.values()["a"] == pytest.approx(expected(2 * q, k), rel=1e-5)
    max_logits.reset()
    assert max_logits.values() == {}


def test_it_may_measure_every_few_steps_only() -> None:
    q, k, _ = tensors()
    max_logits = MaxLogits(every=3)
    measured = []
    for _ in range(7):
        max_logits.record("a", q, k)
        measured.append("a" in max_logits.values())
        max_logits.reset()
    assert measured == [True, False, False, True, False, False, True]
    with pytest.raises(ValueError, match="every is 0"):
        MaxLogits(every=0)


def test_modules_are_watched_as_they_are() -> None:
    torch.manual_seed(1)
    attention = Attention(16, 4)
    max_logits = MaxLogits()
    max_logits.watch({"h": attention})
    x = torch.randn(2, 5, 16)
    attended = attention(x)
    q, k, v = attention.split(x)
    assert max_logits.values()["h"] == pytest.approx(expected(q, k, causal(5, 5), 0.5), rel=1e-5)
    # Outside of the module, and after one that failed inside, nothing is recorded.
    with pytest.raises(RuntimeError):
        attention(torch.randn(2, 5, 7))
    max_logits.reset()
    F.scaled_dot_product_attention(q, k, v)
    assert max_logits.values() == {}
    attended.sum().backward()  # type: ignore[no-untyped-call]


def test_a_compiled_model_may_record() -> None:
    max_logits = MaxLogits()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        max_logits.record("a", q, k, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = tensors()
    torch.compile(attend, backend="aot_eager")(q, k, v).sum().backward()
    assert max_logits.values()["a"] == pytest.approx(expected(q, k, causal(7, 7)), rel=1e-5)


def test_ranks_take_the_maximum_of_all(tmp_path: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        q, k, _ = tensors()
        max_logits = MaxLogits()
        max_logits.record("a", q, k)
        max_logits.all_reduce()
        assert max_logits.values()["a"] == pytest.approx(expected(q, k), rel=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("overlap", [False, True])
def test_qk_clip_holds_the_logits_of_a_gpt(shared: Service, name: str, overlap: bool) -> None:
    model = gpt(layers=1)
    with torch.no_grad():
        # Large queries and keys, as Muon may grow them.
        model.h[0].attn.qkv.weight[:96] *= 12
    max_logits = MaxLogits()
    max_logits.watch({"h.0": model.h[0].attn})
    weight = "h.0.attn.qkv.weight"
    attentions = [
        {"name": "h.0", "query_heads": 4, "head_dim": 12, "threshold": 10, "query": weight, "key": (weight, 48)},
    ]
    groups = suggest(model, muon={"algorithm": "muonclip", "lr": 1e-4}, adamw={"lr": 1e-4}, quiet=True)
    largest = []
    with Optimizer(
        model.named_parameters(),
        groups,
        url=shared.url,
        run=name,
        attentions=attentions,
        max_logits=max_logits,
        overlap=overlap,
    ) as optimizer:
        source = batches()
        batch = next(source)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(batch).backward()  # type: ignore[no-untyped-call]
            receipt = optimizer.step()
            largest.append(receipt.max_logit)
            assert "h.0" in receipt.clipped_heads
    assert largest[0] > 12
    assert max(largest[1:]) < 10.5


def test_muonclip_has_the_defaults_of_kimi(shared: Service, name: str) -> None:
    with MuonClip(nn.Linear(4, 4, bias=False).parameters(), url=shared.url, run=name, nesterov=False) as optimizer:
        group = optimizer.open().groups["muonclip"]
    assert (group["momentum_form"], group["adjust_lr_fn"], group["nesterov"]) == (
        "heavy_ball",
        "match_rms_adamw",
        False,
    )
