"""Training in numpy against the real service, and what it refuses."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import muond
from muond import MuondError, Parameter
from muond.steps.apply import apply_update, is_bfloat16
from muond.steps.parameter import Bound
from muond.steps.updates import Update
from muond.wire.bfloat16 import from_bfloat16, to_bfloat16
from oracle import AdamW, Muon, distance
from service import Service
from trainer import GROUPS, SHAPES, Trainer

SGD = [{"name": "all", "algorithm": "sgd", "lr": 0.5}]


def raised(act: Callable[[], object]) -> MuondError:
    with pytest.raises(MuondError) as caught:
        act()
    return caught.value


def sgd(url: str, name: str, *arrays: npt.NDArray[Any], **options: Any) -> muond.Run:
    parameters = [Parameter(f"p{i}", "all", array) for i, array in enumerate(arrays)]
    return muond.open_run(url, run=name, groups=SGD, parameters=parameters, **options)


def test_muon_and_adamw_follow_their_float64_oracles(shared: Service, name: str) -> None:
    trainer = Trainer()
    oracles = {n: (Muon(w, lr=0.02) if w.ndim == 2 else AdamW(w, lr=0.01)) for n, w in trainer.weights.items()}
    with trainer.open(shared.url, name) as run:
        for step in range(1, 31):
            gradients = trainer.gradients(step)
            receipt = run.step(gradients)
            for key, oracle in oracles.items():
                oracle.step(gradients[key])
            assert (receipt.step, receipt.applied, receipt.skipped) == (step, 4, 0)
            norm = np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients.values()))
            assert receipt.gradient_norm == pytest.approx(norm, rel=1e-6)
    for key, oracle in oracles.items():
        assert distance(trainer.weights[key], oracle.weights) < 2e-6, key


def test_streamed_gradients_in_any_order_and_chunks_give_the_same_bits(shared: Service, name: str) -> None:
    whole, streamed = Trainer(), Trainer()
    with whole.open(shared.url, f"{name}-a") as run:
        digest = whole.train(run, 4)
    with streamed.open(shared.url, f"{name}-b", chunk_bytes=1001) as run:
        for step in range(1, 5):
            gradients = streamed.gradients(step)
            for key in reversed(gradients):
                run.gradient(key, gradients[key])
            assert run.in_flight
            assert run.has_gradient(0)
            run.end()
            assert not run.in_flight
        assert run.digest == digest
    assert streamed.bytes() == whole.bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_the_wire_is_rounding_and_nothing_else(shared: Service, name: str, dtype: str) -> None:
    exact, half = Trainer(), Trainer(dtype=dtype)
    with exact.open(shared.url, f"{name}-a") as a, half.open(shared.url, f"{name}-b") as b:
        exact.train(a, 5)
        half.train(b, 5)
    for key in exact.weights:
        assert distance(half.weights[key], exact.weights[key]) < 4e-3, key


def test_weights_and_gradients_of_every_dtype_and_order(shared: Service, name: str) -> None:
    generator = np.random.default_rng(3)
    start = generator.standard_normal((6, 8))
    gradient = generator.standard_normal((6, 8)).astype(np.float32)
    weights: list[npt.NDArray[Any]] = [
        start.copy(),
        start.astype(np.float32),
        start.astype(np.float16),
        to_bfloat16(start.astype(np.float32)),
        np.asfortranarray(start),
        np.repeat(start, 2, axis=1)[:, ::2],
        start.astype(">f4"),
    ]
    gradients: list[npt.NDArray[Any]] = [
        gradient.astype(np.float64),
        np.asfortranarray(gradient),
        gradient.astype(np.float16).astype(np.float32),
        gradient.astype(">f8"),
        gradient[::-1][::-1],
        gradient,
        gradient.astype(np.longdouble),
    ]
    with sgd(shared.url, name, *weights) as run:
        run.step(gradients)
    for index, (array, tolerance) in enumerate(zip(weights, [0, 1e-7, 1e-3, 8e-3, 0, 0, 1e-7], strict=True)):
        value = from_bfloat16(array) if is_bfloat16(array.dtype) else array
        expected = start - 0.5 * gradients[index].astype(np.float64)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=max(4 * tolerance, 1e-9), err_msg=str(index))


def test_a_bfloat16_gradient_is_taken_as_its_bits(shared: Service, name: str) -> None:
    weights, gradient = np.zeros(5, np.float32), np.array([1, -2, 0.5, 3, 0], np.float32)
    parameter = Parameter("w", "all", weights, gradient_dtype="bfloat16")
    with muond.open_run(shared.url, run=name, groups=SGD, parameters=[parameter]) as run:
        run.step([to_bfloat16(gradient)])
    np.testing.assert_array_equal(weights, -0.5 * gradient)


@pytest.mark.parametrize(
    ("gradient", "code", "words"),
    [
        (np.zeros((2, 3), np.float32), "SHAPE_MISMATCH", "has shape [2, 3], expected [3, 2]"),
        (np.zeros(6, np.float32), "SHAPE_MISMATCH", "has shape [6], expected [3, 2]"),
        (np.zeros((3, 2), np.int64), "DTYPE_UNSUPPORTED", "has dtype int64"),
        (np.zeros((3, 2), np.complex64), "DTYPE_UNSUPPORTED", "has dtype complex64"),
        (np.zeros((3, 2), np.uint16), "DTYPE_UNSUPPORTED", "bfloat16, its gradient_dtype is float32"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_sent(
    shared: Service, name: str, gradient: npt.NDArray[Any], code: str, words: str
) -> None:
    with sgd(shared.url, name, np.zeros((3, 2), np.float32)) as run:
        error = raised(lambda: run.step([gradient]))
        assert (error.code, error.fields.parameter) == (code, 0)
        assert words in str(error)
        assert not run.in_flight
        assert raised(lambda: run.gradient_bytes(0, memoryview(b"12"))).code == "SHAPE_MISMATCH"
        run.step([np.zeros((3, 2), np.float32)])


def test_skipped_parameters_stay_as_they_are(shared: Service, name: str) -> None:
    a, b = np.ones(3, np.float32), np.ones(3, np.float32)
    with sgd(shared.url, name, a, b) as run:
        receipt = run.step([np.ones(3, np.float32), None], skipped=["p1"])
        assert (receipt.applied, receipt.skipped) == (1, 1)
        run.step({}, skipped=[0, 1, 0])
    assert (a.tolist(), b.tolist()) == ([0.5] * 3, [1.0] * 3)


def test_every_parameter_is_accounted_for_once(shared: Service, name: str) -> None:
    ones = np.ones(3, np.float32)
    with sgd(shared.url, name, ones.copy(), ones.copy()) as run:
        error = raised(lambda: run.step([ones, None]))
        assert error.code == "STEP_INCOMPLETE"
        assert "neither a gradient nor a place in skipped for 'p1'" in str(error)
        assert "both a gradient and a place in skipped for 'p0'" in str(
            raised(lambda: run.step([ones, ones], skipped=[0]))
        )
        assert raised(lambda: run.step({"q": ones})).code == "PARAMETER_UNKNOWN"
        assert raised(lambda: run.step({}, skipped=[7])).code == "PARAMETER_UNKNOWN"
        run.gradient("p0", ones)
        assert "has a gradient of 'p0' already" in str(raised(lambda: run.gradient(0, ones)))
        assert "is still in flight" in str(raised(run.begin))
        assert "is still in flight" in str(raised(lambda: run.step([ones, ones])))
        assert raised(run.end).code == "STEP_INCOMPLETE"
        run.gradient("p1", ones)
        assert run.end().step == 1


def test_hyperparameters_scale_and_logits_travel_with_their_step(shared: Service, name: str) -> None:
    weights = np.zeros(4, np.float32)
    ones = np.ones(4, np.float32)
    with sgd(shared.url, name, weights) as run:
        receipt = run.step([ones], groups={"all": {"lr": 0.25}}, gradient_scale=2.0)
        assert run.groups["all"]["lr"] == receipt.groups["all"]["lr"] == 0.25
        run.step([ones])
        run.begin(groups={"all": {"lr": 1}})
        run.gradient(0, ones)
        run.end()
    np.testing.assert_array_equal(weights, np.full(4, -0.5 - 0.25 - 1, np.float32))


def test_qk_clip_brings_the_logits_back_to_the_threshold(shared: Service, name: str) -> None:
    generator = np.random.default_rng(5)
    heads, dim, width = 2, 4, 16
    qkv = generator.standard_normal((3 * heads * dim, width)).astype(np.float32)
    inputs = generator.standard_normal((10, width)).astype(np.float32)

    def largest() -> npt.NDArray[np.float32]:
        q, k = (part.reshape(heads, dim, width) for part in np.split(qkv, 3)[:2])
        logits = np.einsum("hdw,tw,hde,se->hts", q, inputs, k, inputs) / np.sqrt(dim)
        return np.asarray(logits.max(axis=(1, 2)), np.float32)

    attention = {"name": "h", "threshold": 2, "query_heads": heads, "head_dim": dim}
    rows = {"query": {"parameter": 0}, "key": {"parameter": 0, "first_row": heads * dim}}
    before = largest()
    parameters = [Parameter("qkv", "all", qkv), Parameter("other", "all", np.zeros(1, np.float32))]
    with muond.open_run(
        shared.url, run=name, groups=SGD, parameters=parameters, attentions=[{**attention, **rows}]
    ) as run:
        receipt = run.step([None, np.ones(1, np.float32)], skipped=[0], max_logits={"h": before.tolist()})
    assert (before > 2).all()
    assert receipt.clipped_heads == {"h": 2}
    assert receipt.max_logit == pytest.approx(before.max())
    np.testing.assert_allclose(largest(), [2, 2], rtol=1e-5)


def test_logits_that_are_still_on_their_way_are_waited_for_by_the_thread_that_sends(shared: Service, name: str) -> None:
    weights = np.eye(4, dtype=np.float32)
    attention = {"name": "h", "threshold": 2, "query_heads": 1, "head_dim": 2, "query": {"parameter": 0}}
    attention["key"] = {"parameter": 0, "first_row": 2}
    arrived = threading.Event()
    threads = []

    def logits() -> dict[str, list[float]]:
        assert arrived.wait(60)
        threads.append(threading.current_thread())
        return {"h": [8.0]}

    with muond.open_run(
        shared.url, run=name, groups=SGD, parameters=[Parameter("qk", "all", weights)], attentions=[attention]
    ) as run:
        run.begin(max_logits=logits)
        run.gradient(0, np.zeros((4, 4), np.float32))
        arrived.set()
        assert run.end().clipped_heads == {"h": 1}
    assert threading.current_thread() not in threads
    np.testing.assert_allclose(weights, np.eye(4) / 2, rtol=1e-6)


def test_logits_that_cannot_be_had_end_the_step(shared: Service, name: str) -> None:
    def logits() -> dict[str, list[float]]:
        raise RuntimeError("the GPU is gone")

    weights, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    with sgd(shared.url, name, weights) as run:
        run.begin(max_logits=logits)
        run.gradient(0, ones)
        with pytest.raises(RuntimeError, match="the GPU is gone"):
            run.end()
        assert run.step([ones]).step == 1


def test_a_gradient_that_is_not_finite_is_refused_and_the_step_can_be_taken_again(shared: Service, name: str) -> None:
    a, b, ones = np.zeros(3, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32)
    with sgd(shared.url, name, a, b) as run:
        for bad in (np.nan, np.inf):
            error = raised(lambda bad=bad: run.step([ones, np.array([0, bad, 0], np.float32)]))
            assert (error.code, error.status) == ("GRADIENT_NOT_FINITE", 422)
            assert tuple(error.fields.refused) == ("p1",)
        assert (a.tolist(), run.step_count) == ([-0.5] * 3, 0)
        assert run.step([ones, 2 * ones]).step == 1
    assert (a.tolist(), b.tolist()) == ([-0.5] * 3, [-1.0] * 3)


@pytest.mark.parametrize("bad_first", [True, False])
def test_a_step_may_be_ended_without_what_was_refused(shared: Service, name: str, bad_first: bool) -> None:
    a, b, ones = np.zeros(3, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32)
    bad = np.full(3, np.nan, np.float32)
    with sgd(shared.url, name, a, b) as run:
        receipt = run.step([bad, ones] if bad_first else [ones, bad], skip_refused=True)
        assert (receipt.applied, receipt.skipped) == (1, 1)
        assert [error.fields.parameter for error in receipt.refused] == [0 if bad_first else 1]
        assert run.step([ones, ones]).step == 2
        everything = run.step([bad, bad], skip_refused=True)
        assert (everything.applied, everything.skipped, len(everything.refused)) == (0, 2, 2)
    assert sorted([a[0], b[0]]) == [-1.0, -0.5]


def test_other_bytes_for_a_gradient_that_was_applied_are_refused(shared: Service, name: str) -> None:
    ones, bad = np.ones(3, np.float32), np.full(3, np.nan, np.float32)
    with sgd(shared.url, name, np.zeros(3, np.float32), np.zeros(3, np.float32)) as run:
        raised(lambda: run.step([ones, bad]))
        error = raised(lambda: run.step([2 * ones, ones], skip_refused=True))
        assert (error.code, tuple(error.fields.refused)) == ("STEP_CONFLICT", ("p0",))
        assert run.step([ones, ones]).step == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"groups": [{"name": "all", "algorithm": "sgd", "lr": -1}]}, "HYPERPARAMETER_INVALID"),
        ({"groups": [{"name": "all", "algorithm": "sgd", "weight_decy": 0}]}, "HYPERPARAMETER_INVALID"),
        ({"groups": []}, "PARAMETER_INVALID"),
        ({"run": "no spaces"}, "FRAME_MALFORMED"),
        ({"mode": "resume"}, "RUN_NOT_FOUND"),
        ({"mode": "whatever"}, "FRAME_MALFORMED"),
    ],
)
def test_what_the_service_refuses_at_open_is_raised(
    shared: Service, name: str, change: dict[str, Any], code: str
) -> None:
    options: dict[str, Any] = {
        "run": name,
        "groups": SGD,
        "parameters": [Parameter("w", "all", np.zeros(2, np.float32))],
    }
    assert raised(lambda: muond.open_run(shared.url, **{**options, **change})).code == code


def test_what_the_client_refuses_at_open_needs_no_service() -> None:
    def opened(**parameter: Any) -> None:
        muond.open_run("ws://127.0.0.1:1", run="r", parameters=[Parameter("w", "all", **parameter)])

    with pytest.raises(ValueError, match="'w' has neither data nor a shape"):
        opened()
    with pytest.raises(ValueError, match=re.escape("'w' has shape [3], its data has [2]")):
        opened(data=np.zeros(2), shape=[3])
    with pytest.raises(ValueError, match="chunk_bytes is 0, at least 1"):
        muond.open_run(run="r", parameters=[], chunk_bytes=0)


def test_a_run_is_resumed_where_it_was_and_refused_where_it_differs(shared: Service, name: str) -> None:
    alone, first = Trainer(), Trainer()
    with alone.open(shared.url, f"{name}-alone") as run:
        digest = alone.train(run, 6)
    with first.open(shared.url, name, mode="create") as run:
        first.train(run, 3)
    assert raised(lambda: first.open(shared.url, name, mode="create")).code == "RUN_EXISTS"
    other = [Parameter("up", "matrices", np.zeros((9, 9), np.float32))]
    error = raised(lambda: muond.open_run(shared.url, run=name, groups=GROUPS, parameters=other))
    assert error.code == "RUN_MISMATCH"
    with first.open(shared.url, name, mode="resume") as run:
        assert (run.step_count, run.opened["resumed"], run.name) == (3, True, name)
        assert first.train(run, 3) == digest
    assert first.bytes() == alone.bytes()


def test_a_resumed_run_with_another_count_of_parameters_is_refused(shared: Service, name: str) -> None:
    with sgd(shared.url, name, np.zeros(2, np.float32)):
        pass
    error = raised(lambda: muond.open_run(shared.url, run=name, mode="resume", parameters=[]))
    assert error.code in ("RUN_MISMATCH", "PARAMETER_INVALID")


def test_a_run_has_one_writer_and_who_takes_it_over_keeps_it(shared: Service, name: str) -> None:
    trainer = Trainer()
    first = trainer.open(shared.url, name)
    trainer.train(first, 1)
    assert raised(lambda: trainer.open(shared.url, name)).code == "RUN_BUSY"
    second = trainer.open(shared.url, name, takeover=True)
    for _ in range(2):
        assert raised(lambda: first.step(trainer.gradients(2))).code == "TAKEN_OVER"
    assert second.step(trainer.gradients(2)).step == 2
    first.close()
    second.close()


def test_a_closed_run_says_so(shared: Service, name: str) -> None:
    run = sgd(shared.url, name, np.zeros(2, np.float32))
    run.close()
    run.close()
    assert run.closed
    assert raised(lambda: run.step([np.zeros(2, np.float32)])).code == "CLIENT_CLOSED"
    assert raised(run.begin).code == "CLIENT_CLOSED"


def test_a_run_that_is_closed_in_the_middle_of_a_step_ends_it(shared: Service, name: str) -> None:
    run = sgd(shared.url, name, np.zeros(2, np.float32), np.zeros(2, np.float32))
    run.gradient(0, np.ones(2, np.float32))
    run.close()
    assert not run.in_flight
    shared.event("run_opened", lambda event: event["run"] == name)


def test_a_forgotten_run_lets_its_connection_go(shared: Service, name: str) -> None:
    run = sgd(shared.url, name, np.zeros(2, np.float32))
    run.step([np.ones(2, np.float32)])
    del run
    with sgd(shared.url, name, np.zeros(2, np.float32)) as again:
        assert again.step_count == 1


def test_updates_go_to_a_function_of_the_callers_own(shared: Service, name: str) -> None:
    seen: list[tuple[str, float, float, list[float]]] = []

    def apply(updates: Sequence[Update]) -> None:
        for update in updates:
            assert update.data is not None
            seen.append((update.parameter.name, update.scale, update.decay, update.data.view(np.float32).tolist()))

    sizes: list[int] = []

    def allocate(size: int) -> npt.NDArray[np.uint8]:
        sizes.append(size)
        return np.zeros(size, np.uint8)

    parameter = Parameter("w", "all", shape=[2])
    with muond.open_run(
        shared.url,
        run=name,
        groups=SGD,
        parameters=[parameter],
        apply=apply,
        allocate=allocate,
        transport="websocket",
    ) as run:
        for _ in range(3):
            run.step([np.ones(2, np.float32)])
    assert seen == [("w", -0.5, 0, [1.0, 1.0])] * 3
    assert sizes == [8], "memory is used again"
    with (
        muond.open_run(shared.url, run=f"{name}-2", groups=SGD, parameters=[parameter]) as run,
        pytest.raises(ValueError, match="'w' was opened without data"),
    ):
        run.step([np.ones(2, np.float32)])


def test_settling_ends_a_step_whose_gradients_nobody_has_any_more(shared: Service, name: str) -> None:
    arrays = [np.zeros(2, np.float32) for _ in range(3)]
    ones = np.ones(2, np.float32)
    crashed = sgd(shared.url, name, *arrays)
    raised(lambda: crashed.step([ones, np.full(2, np.nan, np.float32), ones]))
    crashed.close()
    weights = [np.zeros(2, np.float32) for _ in range(3)]
    with sgd(shared.url, name, *weights) as run:
        assert run.opened["ahead"] == [0, 2]
        assert run.settle() == ["p0", "p2"]
        assert run.step_count == 1
        assert [w.tolist() for w in weights] == [[0, 0]] * 3
        assert run.step([ones, ones, ones]).step == 2
        assert run.settle() == []


def test_a_run_released_between_steps_goes_on_after_it_was_opened_again(shared: Service, name: str) -> None:
    trainer = Trainer()
    with trainer.open(shared.url, name) as run:
        trainer.train(run, 2)
        run.release()
        assert raised(lambda: run.step(trainer.gradients(3))).code == "CLIENT_CLOSED"
        run.reopen()
        assert run.step_count == 2
        digest = trainer.train(run, 2)
    alone = Trainer()
    with alone.open(shared.url, f"{name}-alone") as run:
        assert alone.train(run, 4) == digest


def test_opening_again_forgets_what_was_in_flight(shared: Service, name: str) -> None:
    arrays = [np.zeros(2, np.float32), np.zeros(2, np.float32)]
    ones = np.ones(2, np.float32)
    with sgd(shared.url, name, *arrays) as run:
        run.gradient(0, ones)
        # Its update has come and is not applied.
        run._events.put(run._events.get(timeout=30))
        run.reopen()
        assert not run.in_flight
        assert run.step([ones, ones]).step == 1
    assert [array.tolist() for array in arrays] == [[-0.5, -0.5]] * 2


def test_bytes_that_are_still_on_their_way_are_waited_for(shared: Service, name: str) -> None:
    weights, gradient = np.zeros(2, np.float32), np.zeros(2, np.float32)

    def ready() -> None:
        gradient[:] = 2

    with sgd(shared.url, name, weights) as run:
        run.gradient_bytes(0, gradient.view(np.uint8).data, ready)
        run.end()
    assert weights.tolist() == [-1, -1]


def test_what_goes_wrong_on_their_way_is_raised_and_the_step_can_be_taken_again(shared: Service, name: str) -> None:
    weights, ones = np.zeros(2, np.float32), np.ones(2, np.float32)

    def broken() -> None:
        raise OSError("the GPU has fallen off the bus")

    with sgd(shared.url, name, weights) as run:
        run.gradient_bytes(0, ones.view(np.uint8).data, broken)
        with pytest.raises(OSError, match="fallen off the bus"):
            run.end()
        assert run.step([ones]).step == 1
    assert weights.tolist() == [-0.5, -0.5]


def bound(shape: tuple[int, ...], dtype: str = "float32") -> Bound:
    return Bound(0, "w", shape, dtype, dtype)


def test_the_formula_on_large_arrays_with_row_scales() -> None:
    generator = np.random.default_rng(2)
    shape = (300, 517)
    data = generator.standard_normal(shape).astype(np.float32)
    rows = generator.uniform(0.5, 1, 300).astype(np.float32)
    update = Update(bound(shape), -0.3, 0.01, data.view(np.uint8).reshape(-1), rows)
    start = generator.standard_normal(shape)
    expected = rows[:, None].astype(np.float64) * ((1 - 0.01) * start - 0.3 * data.astype(np.float64))
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6), (np.float16, 2e-3)):
        weights = start.astype(dtype)
        apply_update(weights, update)
        np.testing.assert_allclose(weights, expected, rtol=tolerance, atol=tolerance)
    only_rows = start.copy()
    apply_update(only_rows, Update(bound(shape), 0, 0, None, rows))
    np.testing.assert_allclose(only_rows, rows[:, None] * start, rtol=1e-15)


def test_shapes_are_those_of_the_declaration() -> None:
    declared = Parameter("w", "g", np.zeros((4, 2), np.float32), split=[3, 1]).declaration()
    assert declared == {
        "name": "w",
        "shape": [4, 2],
        "group": "g",
        "gradient_dtype": "float32",
        "update_dtype": "float32",
        "split": [3, 1],
    }
    assert list(SHAPES) == [parameter.name for parameter in Trainer().parameters()]
