"""Runs whose tensors travel in blocks: the weights are those of a run with what they decode to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import muond
from muond import MuondError, Parameter
from muond.wire.blocks import decode, encode
from service import Service

Array = npt.NDArray[Any]
GROUPS = [{"name": "all", "algorithm": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True}]
SHAPE = (30, 21)


def gradient(step: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(step).normal(size=SHAPE).astype(np.float32)


def weights(dtype: type = np.float32) -> Array:
    return np.random.default_rng(0).normal(size=SHAPE).astype(dtype)


def opened(shared: Service, name: str, data: Array, gradients: str, updates: str = "float32", **options: Any) -> Any:
    parameter = Parameter("w", "all", data, gradient_dtype=gradients, update_dtype=updates)
    return muond.open_run(shared.url, run=name, parameters=[parameter], groups=GROUPS, **options)


@pytest.mark.parametrize("dtype", ["int8_block256", "int4_block64"])
@pytest.mark.parametrize("weights_dtype", [np.float32, np.float64, np.float16])
def test_gradients_are_what_they_decode_to(shared: Service, name: str, dtype: str, weights_dtype: type) -> None:
    wide, narrow = weights(weights_dtype), weights(weights_dtype)
    with (
        opened(shared, f"{name}-wide", wide, "float32") as reference,
        opened(shared, name, narrow, dtype, chunk_bytes=100) as run,
    ):
        assert run.transport == "websocket"
        for step in (1, 2, 3):
            decoded = decode(encode(gradient(step), dtype), dtype, wide.size).reshape(SHAPE)
            assert run.step([gradient(step)]).digest != reference.step([decoded]).digest
    assert wide.tobytes() == narrow.tobytes()


@pytest.mark.parametrize("dtype", ["int8_block256", "int4_block64"])
def test_an_update_is_off_by_half_a_scale_at_most(shared: Service, name: str, dtype: str) -> None:
    wide, narrow = weights(), weights()
    with (
        opened(shared, f"{name}-wide", wide, "float32") as reference,
        opened(shared, name, narrow, "float32", dtype) as run,
    ):
        reference.step([gradient(1)])
        run.step([gradient(1)])
    # Of the update, of which lr 0.7 is taken.
    update = (weights() - wide) / np.float32(0.7)
    expected = decode(encode(update, dtype), dtype, update.size).reshape(SHAPE)
    np.testing.assert_allclose(
        narrow, weights() - np.float32(0.7) * expected, atol=2e-2 if dtype == "int8_block256" else 0.4
    )
    assert not np.array_equal(narrow, wide)


def test_members_send_whole_blocks(shared: Service, name: str) -> None:
    dtype = "int4_block64"
    alone = weights()
    with opened(shared, f"{name}-alone", alone, dtype, dtype) as run:
        digest = run.step([gradient(1)]).digest
    ranges = [[(0, 128), (576, 630)], [(128, 576)]]
    flat, sent = weights().reshape(-1), gradient(1).reshape(-1)
    parts = [np.concatenate([flat[start:stop] for start, stop in these]) for these in ranges]
    runs = [
        muond.open_run(
            shared.url,
            run=name,
            parameters=[Parameter("w", "all", parts[rank], SHAPE, dtype, dtype, ranges=ranges[rank])],
            groups=GROUPS,
            member=(rank, 2),
            chunk_bytes=50,
        )
        for rank in range(2)
    ]
    for rank, run in enumerate(runs):
        run.gradient("w", np.concatenate([sent[start:stop] for start, stop in ranges[rank]]))
    with ThreadPoolExecutor(2) as pool:
        receipts = list(pool.map(lambda run: run.end(), runs))
    assert [receipt.digest for receipt in receipts] == [digest, digest]
    for rank, these in enumerate(ranges):
        assert (
            np.concatenate([alone.reshape(-1)[start:stop] for start, stop in these]).tobytes() == parts[rank].tobytes()
        )
    for run in runs:
        run.close()


def test_nan_is_refused_and_changes_nothing(shared: Service, name: str) -> None:
    data = weights()
    with opened(shared, name, data, "int4_block64") as run:
        bad = gradient(1)
        bad[3, 4] = np.nan
        with pytest.raises(MuondError, match="holds NaN or Inf") as caught:
            run.step([bad])
        assert caught.value.code == "GRADIENT_NOT_FINITE"
        assert data.tobytes() == weights().tobytes()


def test_memory_is_not_shared_and_the_reason_is_told(shared: Service, name: str) -> None:
    with pytest.raises(ValueError, match="'shm' is not possible: the tensors of 'w' travel in blocks"):
        opened(shared, name, weights(), "float32", "int8_block256", transport="shm")
