"""Gradients and updates in blocks from a torch optimizer, and what they lose, which is added to the next gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import net, train

from muond.torch import AdamW, Optimizer
from muond.torch.blocks import decode, encode
from muond.torch.feedback import KEY
from service import ROOT, Service

CASES: list[dict[str, Any]] = json.loads((ROOT / "test" / "golden" / "blocks.json").read_text())


def floats(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["title"])
def test_the_bytes_are_those_that_every_program_encodes_and_decodes(case: dict[str, Any]) -> None:
    values = floats(case["values"])
    data = encode(values, case["dtype"])
    assert bytes(data.tolist()).hex() == case["bytes"]
    torch.testing.assert_close(
        decode(data, case["dtype"], len(values)), floats(case["decoded"]), rtol=0, atol=0, equal_nan=True
    )


def sgd(weight: torch.Tensor, service: Service, **options: Any) -> Optimizer:
    """Momentum 0: an update is the gradient that came."""
    given = {"gradient_dtype": "int4_block64", "update_dtype": "float32", "url": service.url, **options}
    return Optimizer([("w", weight)], [{"parameters": "w", "algorithm": "sgd", "lr": 1.0}], **given)


def of(seed: int, count: int = 100) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def take(optimizer: Optimizer, weight: torch.Tensor, gradient: torch.Tensor) -> None:
    weight.grad = gradient
    optimizer.step()


def test_what_a_gradient_loses_is_added_to_the_next(shared: Service) -> None:
    weight, lost = torch.zeros(100, requires_grad=True), torch.zeros(100)
    expected = torch.zeros(100)
    with sgd(weight, shared) as optimizer:
        for step in range(4):
            gradient = of(step)
            decoded = decode(encode(gradient + lost, "int4_block64"), "int4_block64", 100)
            lost = gradient + lost - decoded
            take(optimizer, weight, gradient)
            expected -= decoded
            assert torch.equal(weight.detach(), expected)
            assert torch.equal(optimizer.state[weight][KEY], lost)


def test_without_feedback_nothing_is_kept(shared: Service) -> None:
    weight = torch.zeros(100, requires_grad=True)
    with sgd(weight, shared, error_feedback=False) as optimizer:
        take(optimizer, weight, of(1))
        take(optimizer, weight, of(1))
        assert torch.equal(weight.detach(), -2 * decode(encode(of(1), "int4_block64"), "int4_block64", 100))
        assert KEY not in optimizer.state[weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_has_it_and_training_goes_on_with_the_same_bits(shared: Service, dtype: torch.dtype) -> None:
    weight = torch.zeros(100, dtype=dtype, requires_grad=True)
    with sgd(weight, shared) as optimizer:
        for step in range(2):
            take(optimizer, weight, of(step).to(dtype))
        saved = optimizer.state_dict()
        assert saved["state"][0][KEY].dtype == torch.float32
        again = weight.detach().clone().requires_grad_()
        take(optimizer, weight, of(2).to(dtype))
    with sgd(again, shared) as other:
        other.load_state_dict(saved)
        take(other, again, of(2).to(dtype))
    assert torch.equal(again, weight)


def test_a_step_that_is_refused_loses_nothing(shared: Service) -> None:
    weight = torch.zeros(100, requires_grad=True)
    with sgd(weight, shared, on_nonfinite="skip_parameter") as optimizer:
        take(optimizer, weight, of(1))
        lost = optimizer.state[weight][KEY]
        take(optimizer, weight, torch.full((100,), float("nan")))
        assert [error.code for error in optimizer.receipt.refused] == ["GRADIENT_NOT_FINITE"]  # type: ignore[union-attr]
        assert torch.equal(optimizer.state[weight][KEY], lost)


def test_a_rollback_goes_back_to_what_was_lost_then(durable: Callable[..., Service]) -> None:
    weight = torch.zeros(100, requires_grad=True)
    with sgd(weight, durable(), keep="cpu") as optimizer:
        for step in range(2):
            take(optimizer, weight, of(step))
        optimizer.checkpoint()
        take(optimizer, weight, of(2))
        after = weight.detach().clone()
        assert optimizer.rollback() == 2
        take(optimizer, weight, of(2))
        assert torch.equal(weight.detach(), after)


def test_a_rollback_to_before_the_first_gradient_has_lost_nothing(durable: Callable[..., Service]) -> None:
    weight = torch.zeros(100, requires_grad=True)
    with sgd(weight, durable(), keep="cpu") as optimizer:
        optimizer.open()
        optimizer.checkpoint()
        take(optimizer, weight, of(1))
        assert optimizer.rollback() == 0
        assert not optimizer.state[weight][KEY].any()


def test_updates_in_blocks_train_as_those_of_float32_do_within_their_error(shared: Service) -> None:
    models = {dtype: net() for dtype in ("float32", "int8_block256")}
    for dtype, model in models.items():
        with AdamW(
            model.named_parameters(),
            lr=1e-2,
            url=shared.url,
            gradient_dtype=dtype,
            update_dtype=dtype,
            overlap=dtype != "float32",
        ) as optimizer:
            train(model, optimizer, 5)
    flat = {dtype: torch.cat([p.detach().reshape(-1) for p in model.parameters()]) for dtype, model in models.items()}
    before = torch.cat([p.detach().reshape(-1) for p in net().parameters()])
    error = (flat["float32"] - flat["int8_block256"]).norm() / (flat["float32"] - before).norm()
    assert 0 < error < 0.1


def test_the_error_over_many_steps_is_that_of_one(shared: Service) -> None:
    """With feedback a sum of decoded gradients stays within one step's error of the sum; without it errors add up."""
    weight = torch.zeros(256, requires_grad=True)
    gradient = of(5, 256)
    with sgd(weight, shared) as optimizer:
        for _ in range(20):
            take(optimizer, weight, gradient.clone())
    error = (weight.detach() + 20 * gradient).abs().max()
    assert error <= 0.5 * gradient.abs().max() / 7 * 1.2


def test_an_unfinished_step_that_is_left_counts_for_nothing(shared: Service) -> None:
    weight = torch.zeros(100, requires_grad=True)
    with sgd(weight, shared) as optimizer:
        take(optimizer, weight, of(1))
        lost = optimizer.state[weight][KEY]
        optimizer._feedback.encode(optimizer._home.slots[0], of(2))  # type: ignore[union-attr]
        take(optimizer, weight, of(3))
        wanted = of(3) + lost
        assert torch.equal(
            optimizer.state[weight][KEY], wanted - decode(encode(wanted, "int4_block64"), "int4_block64", 100)
        )
