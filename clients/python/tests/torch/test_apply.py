"""torch's own operations, and how far they are from the arithmetic of docs/protocol.md."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from golden import GOLDEN, Golden
from muond.steps.apply import widen
from muond.torch.apply import Views, apply_updates

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIGITS = {"float64": 53, "float32": 24, "bfloat16": 8, "float16": 11}


def tensor_of(array: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.copy().view(np.uint8)).view(DTYPES[dtype]).view(array.shape)


def units(largest: torch.Tensor, dtype: str) -> torch.Tensor:
    """One unit in the last place of each of these, as if no number was subnormal."""
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - DIGITS[dtype])


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.title)
def test_torch_stays_within_its_bound_of_the_bits_that_every_client_has(golden: Golden) -> None:
    weights = tensor_of(golden.weights, golden.dtype)
    apply_updates(cast(Any, [SimpleNamespace(local=weights)]), [golden.update], Views())
    expected = tensor_of(golden.expected, golden.dtype)
    if golden.update.data is None:
        assert weights.equal(expected), "rows alone have one product, and nothing to fuse"
        return
    finite = expected.isfinite()
    assert weights.isfinite().equal(finite)
    data = torch.from_numpy(widen(golden.update.data, golden.update.parameter.update_dtype)).view(weights.shape)
    added = (golden.update.scale * data.double()).abs()
    # A fused multiply-add leaves out the rounding of this product.
    bound = units(torch.maximum(added, expected.double().abs()), golden.dtype)
    if golden.dtype in ("bfloat16", "float16"):
        # torch rounds the product with 1 - decay to the weights' own type as well.
        bound = bound + units(tensor_of(golden.weights, golden.dtype).double().abs(), golden.dtype) / 2
    distance = (weights.double() - expected.double()).abs()
    # Rows are scaled afterwards, which rounds once more.
    assert (distance <= bound * (1 if golden.update.row_scale is None else 2))[finite].all()


@pytest.mark.parametrize(
    "golden", [golden for golden in GOLDEN if golden.update.data is not None], ids=lambda golden: golden.title
)
def test_the_roundings_are_those_of_torchs_own_optimizers(golden: Golden) -> None:
    """torch.optim has ``param.mul_(1 - lr * weight_decay)`` and ``param.add_(update, alpha=-lr)``."""
    update = golden.update
    weights, expected = tensor_of(golden.weights, golden.dtype), tensor_of(golden.weights, golden.dtype)
    data = torch.from_numpy(np.asarray(update.data)).view(DTYPES[update.parameter.update_dtype]).view(weights.shape)
    expected.mul_(1 - update.decay).add_(data, alpha=update.scale)
    apply_updates(cast(Any, [SimpleNamespace(local=weights)]), [replace(update, row_scale=None)], Views())
    assert weights.equal(expected)


def test_another_default_device_changes_nothing() -> None:
    golden = next(golden for golden in GOLDEN if golden.update.row_scale is not None and golden.dtype == "float32")
    weights, beside = tensor_of(golden.weights, golden.dtype), tensor_of(golden.weights, golden.dtype)
    apply_updates(cast(Any, [SimpleNamespace(local=weights)]), [golden.update], Views())
    with torch.device("meta"):
        apply_updates(cast(Any, [SimpleNamespace(local=beside)]), [golden.update], Views())
    assert beside.equal(weights)
