"""A gradient with NaN or Inf: by default the whole step is skipped, as GradScaler skips one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import ALGORITHMS, EXACT, apart, backward, made, model, steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from muond import MuondError
from muond.torch import AdamW
from muond.torch.finite import nonfinite
from service import Service

BAD = [float("nan"), float("inf"), -float("inf")]


def spoiled(module: nn.Sequential, optimizer: Any, value: float) -> None:
    optimizer.zero_grad()
    backward(module, 99)
    module[2].weight.grad[0, 3] = value  # type: ignore[index, operator, union-attr]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_step_is_skipped_and_nothing_has_moved(shared: Service, algorithm: str) -> None:
    pair = made(shared, algorithm)
    theirs, ours, alone = model(), model(), model()
    reference, optimizer, other = (
        pair.theirs(theirs.parameters()),
        pair.ours(ours.parameters()),
        pair.ours(alone.parameters()),
    )
    for first, value in zip((1, 4, 7), BAD, strict=True):
        for module, each in ((theirs, reference), (ours, optimizer), (alone, other)):
            steps(module, each, 3, first)
        spoiled(ours, optimizer, value)
        with pytest.warns(
            RuntimeWarning, match=r"'param.1' for step \d+ has NaN or Inf .*the step is skipped, nothing has moved"
        ):
            assert optimizer.step() is None
        with pytest.warns(RuntimeWarning, match="is skipped"):
            assert optimizer.step(lambda: 2.5) == 2.5
    assert optimizer.step_count == 9
    assert optimizer.run.digest == other.run.digest
    assert apart(ours, theirs) < pair.tolerance


def test_or_it_raises_and_nothing_has_moved(shared: Service) -> None:
    module, alone = model(), model()
    pair = made(shared, "adamw")
    optimizer, other = pair.ours(module.named_parameters(), on_nonfinite="raise"), pair.ours(alone.named_parameters())
    steps(module, optimizer, 2)
    spoiled(module, optimizer, BAD[0])
    with pytest.raises(MuondError, match=r"'2.weight' for step 3 .* nothing has moved") as caught:
        optimizer.step()
    assert (caught.value.code, caught.value.fields.refused) == ("GRADIENT_NOT_FINITE", ("2.weight",))
    steps(module, optimizer, 2, 3)
    steps(alone, other, 4)
    assert apart(module, alone) == 0.0


def test_or_the_parameter_alone_is_left_out(shared: Service) -> None:
    module = model()
    optimizer = made(shared, "adamw").ours(module.named_parameters(), on_nonfinite="skip_parameter")
    spoiled(module, optimizer, BAD[0])
    before = [p.detach().clone() for p in module.parameters()]
    receipt = optimizer.step()
    assert [error.fields.parameter for error in receipt.refused] == [1]
    assert [torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)] == [False, True]
    steps(module, optimizer, 1)
    assert optimizer.step_count == 2


def test_with_overlap_the_others_have_left(shared: Service) -> None:
    with pytest.raises(ValueError, match="needs overlap=False"):
        made(shared, "adamw").ours(model().parameters(), overlap=True, on_nonfinite="skip_step")
    module = model()
    optimizer = made(shared, "adamw").ours(module.named_parameters(), overlap=True)
    (module(torch.ones(2, 8)) * torch.tensor(float("nan"))).sum().backward()
    with pytest.raises(MuondError, match="step 1 was ended without") as caught:
        optimizer.step()
    assert caught.value.code == "GRADIENT_NOT_FINITE"
    assert optimizer.step_count == 1


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 3.4e38), ("float16", 7e4)])
def test_what_is_not_finite_once_it_is_rounded_counts(shared: Service, dtype: Any, value: float) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = AdamW([weight], url=shared.url, gradient_dtype=dtype)
    weight.grad = torch.full((4, 4), value)
    with pytest.warns(RuntimeWarning, match="once it is rounded to its gradient_dtype"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))


# Of the largest numbers the sum of two overflows, and all are finite.
NUMBERS = [0.0, 1.5, -2.0, 3.0e38, -3.0e38, 3.4e38, 6.5e4, -6.5e4, 7.0e4, *BAD]


@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_found_is_what_is_not_finite(shared: Service, dtype: torch.dtype, gradient_dtype: Any) -> None:
    weights = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((7,), (2, 3), (3, 5, 2), ())]
    with AdamW(weights, url=shared.url, gradient_dtype=gradient_dtype) as optimizer:
        optimizer.open()
        wire = getattr(torch, gradient_dtype)

        @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 29), st.sampled_from(NUMBERS)), max_size=12))
        @settings(derandomize=True, max_examples=60, deadline=None)
        def check(put: list[tuple[int, int, float]]) -> None:
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            for index, at, value in put:
                flat = weights[index].grad.view(-1)  # type: ignore[union-attr]
                flat[at % flat.numel()] = value
            found = [slot.index for slot in nonfinite(optimizer._home.slots)]
            gradients = [weight.grad for weight in weights]
            finite = [bool(gradient.to(wire).isfinite().all()) for gradient in gradients]  # type: ignore[union-attr]
            assert sorted(found) == [index for index, fine in enumerate(finite) if not fine]

        check()


def test_grad_scaler_finds_it_first(shared: Service) -> None:
    pair = made(shared, "adamw")
    ends = []
    for make in pair.both:
        module = model()
        optimizer = make(module.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(1, 7):
            optimizer.zero_grad()
            out = module(torch.full((4, 8), float(step))).square().mean() * (float("inf") if step == 3 else 1.0)
            scaler.scale(out).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        ends.append(module)
    assert apart(ends[1], ends[0]) < 1e-5


def test_other_values_are_refused(shared: Service) -> None:
    with pytest.raises(ValueError, match="on_nonfinite is 'skip', expected one of"):
        AdamW([nn.Parameter(torch.ones(2))], url=shared.url, on_nonfinite="skip", **EXACT)
