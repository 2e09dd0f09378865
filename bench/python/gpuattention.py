"""Checks for gpu.py of MaxLogits: the largest logit of each head against float64, for every kind of attention."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from muond.torch import MaxLogits, Optimizer, suggest
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from checks import Checks
from gpt import batches, gpt
from service import ROOT, end_with_parent
from syncs import syncs_are_errors

# A threshold that the logits of random weights exceed.
_THRESHOLD = 1e-3
_SIZES = {"vocabulary": 256, "width": 64, "heads": 4, "layers": 2, "context": 64}
_COMPILED = "max_scores of flex_attention, compiled"


def check(checks: Checks, device: torch.device, url: str) -> None:
    q, k, v, causal = _tensors(device)
    max_logits = MaxLogits()
    max_logits.scaled_dot_product_attention("a", q, k, v, is_causal=True)
    _compare(checks, "max_logits of scaled_dot_product_attention", distance(max_logits, _exact(q, k, causal)), 1e-5)
    apart = distance(*measured(device, flex_attention))
    _compare(checks, "max_scores of flex_attention, not compiled", apart, 1e-5)
    _clip(checks, device, url)


def measured(device: torch.device, attend: Any) -> tuple[MaxLogits, torch.Tensor]:
    """The largest logits by flex_attention, and by float64."""
    q, k, v, causal = _tensors(device)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[-2], k.shape[-2], device=device.type)
    max_logits = MaxLogits()
    with warnings.catch_warnings():
        # Here flex_attention is tried without being compiled, of which it warns.
        warnings.simplefilter("ignore")
        output = max_logits.flex_attention("a", q, k, v, attend=attend, block_mask=mask)
    if output.requires_grad:
        output.sum().backward()  # type: ignore[no-untyped-call]
    return max_logits, _exact(q, k, causal)


def distance(max_logits: MaxLogits, wanted: torch.Tensor) -> float:
    """The largest relative error of any head."""
    return float(((torch.tensor(max_logits.values()["a"]) - wanted).abs() / wanted.abs()).max())


def start_compiling(device: torch.device) -> subprocess.Popen[str] | None:
    """Compiles beside the other checks; None without a GPU."""
    if device.type != "cuda":
        return None
    program = Path(__file__).with_name("flexcompiled.py")
    return subprocess.Popen(
        [sys.executable, str(program), str(device)], stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
    )


def collect_compiled(checks: Checks, process: subprocess.Popen[str] | None, seconds: float) -> None:
    if process is None:
        checks.note(_COMPILED, "not tried: no GPU")
        return
    try:
        answer, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
        checks.note(_COMPILED, "not compiled in time")
        return
    if process.returncode == 3:
        checks.note(_COMPILED, "not tried: torch.compile does not work here (the reason is above)")
    elif process.returncode != 0:
        checks.add(_COMPILED, f"ended with {process.returncode}", "", False)
    else:
        # The kernel of flex_attention multiplies in TF32 where it may.
        _compare(checks, _COMPILED, float(answer), 5e-3)


def _tensors(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Query, key, value, and which keys a query sees."""
    torch.manual_seed(5)
    # flex_attention has no backward pass on a CPU.
    gradients = device.type == "cuda"
    q, k, v = (torch.randn(2, 8, 256, 64, device=device, requires_grad=gradients) for _ in range(3))
    return q, k, v, torch.ones(256, 256, dtype=torch.bool, device=device).tril()


def _exact(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    logits = q.detach().double() @ k.detach().double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return logits.masked_fill(~seen, -torch.inf).amax(dim=(0, 2, 3)).cpu()


def _compare(checks: Checks, what: str, apart: float, bound: float) -> None:
    checks.add(f"{what}, against float64", f"{apart:.1e}", f"<= {bound:.0e}", apart <= bound)


def _clip(checks: Checks, device: torch.device, url: str) -> None:
    """Logits are measured and sent without a wait in backward, and heads above the threshold are clipped."""
    model = gpt(device, **_SIZES)
    max_logits = MaxLogits()
    max_logits.watch({f"h.{layer}": block.attn for layer, block in enumerate(model.h)})
    width = _SIZES["width"]
    attentions = [
        {
            "name": f"h.{layer}",
            "query_heads": 4,
            "head_dim": width // 4,
            "threshold": _THRESHOLD,
            "query": f"h.{layer}.attn.c_attn.weight",
            "key": (f"h.{layer}.attn.c_attn.weight", width),
        }
        for layer in range(len(model.h))
    ]
    groups = suggest(model, muon={"algorithm": "muonclip", "lr": 2e-3}, adamw={"lr": 1e-3}, quiet=True)
    text = (ROOT / "docs" / "algorithms.md").read_bytes()
    clipped, above = 0, 0
    with Optimizer(
        model.named_parameters(),
        groups,
        url=url,
        run="clip",
        attentions=attentions,
        max_logits=max_logits,
        overlap=True,
    ) as optimizer:
        for step, batch in zip(range(4), batches(text, 8, 65, device), strict=False):
            optimizer.zero_grad()
            loss = model.loss(batch)
            # The first step allocates.
            with syncs_are_errors(device) if step > 0 else contextlib.nullcontext():
                loss.backward()  # type: ignore[no-untyped-call]
            above += sum(largest > _THRESHOLD for heads in max_logits.values().values() for largest in heads)
            clipped += sum(optimizer.step().clipped_heads.values())
    checks.add("heads clipped with overlap, 4 steps", str(clipped), f"{above}, all above", clipped == above > 0)
