"""Members of one run, each with its ranges: together they have the weights and the digest of one trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import muond
from muond import MuondError, Parameter
from muond.steps.ranges import Ranges
from service import Proxy, Service
from trainer import GROUPS, QUICK, SHAPES, Trainer

WORLD = 3
STEPS = 3
Cuts = dict[str, list[list[tuple[int, int]]]]


def cuts_of(seed: int) -> Cuts:
    """Two ranges of each parameter for each rank; some are empty."""
    generator = np.random.default_rng(seed)
    cuts: Cuts = {}
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        bounds = [0, *sorted(generator.integers(0, size + 1, 2 * WORLD - 1).tolist()), size]
        pairs = [(bounds[i], bounds[i + 1]) for i in range(2 * WORLD)]
        cuts[name] = [[pair for pair in (pairs[r], pairs[r + WORLD]) if pair[0] < pair[1]] for r in range(WORLD)]
    return cuts


def part(whole: npt.NDArray[Any], ranges: Sequence[tuple[int, int]]) -> npt.NDArray[Any]:
    flat = np.asarray(whole).reshape(-1)
    return np.concatenate([flat[:0], *(flat[start:stop] for start, stop in ranges)])


def put(whole: npt.NDArray[Any], values: npt.NDArray[Any], ranges: Sequence[tuple[int, int]]) -> None:
    flat, done = whole.reshape(-1), 0
    for start, stop in ranges:
        flat[start:stop] = values[done : done + stop - start]
        done += stop - start


class Mate:
    """One member of the trainer's run."""

    def __init__(self, url: str, name: str, rank: int, cuts: Cuts, **options: Any) -> None:
        self.ranges = {key: cuts[key][rank] for key in SHAPES}
        self.weights = {key: part(array, self.ranges[key]) for key, array in Trainer().weights.items()}
        parameters = [
            Parameter(key, "matrices" if len(shape) == 2 else "rest", self.weights[key], shape, ranges=self.ranges[key])
            for key, shape in SHAPES.items()
        ]
        options = {"groups": GROUPS, "backoff": QUICK, **options}
        self.run = muond.open_run(url, run=name, parameters=parameters, member=(rank, WORLD), **options)

    def step(self, gradients: dict[str, npt.NDArray[np.float32]]) -> str:
        return self.run.step({key: part(g, self.ranges[key]) for key, g in gradients.items()}).digest


def together(work: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(each) for each in work]]


@pytest.mark.parametrize(
    ("transports", "budgets"),
    [
        (["websocket"] * WORLD, ()),
        (["websocket"] * WORLD, (9_000, 12_000, 15_000)),
        (["shm", "websocket", "shm"], ()),
        (["shm"] * WORLD, (2_900, 3_300, 3_700)),
    ],
)
def test_members_train_as_one(
    shared: Service, proxy: Callable[..., Proxy], name: str, transports: list[str], budgets: tuple[int, ...]
) -> None:
    trainer = Trainer()
    cuts = cuts_of(len(budgets))
    proxies = [proxy(shared.port, list(budgets[rank:])) for rank in range(WORLD)]
    mates = [
        Mate(each.url, name, rank, cuts, retries=30, chunk_bytes=1_001, transport=transports[rank])
        for rank, each in enumerate(proxies)
    ]
    assert [mate.run.transport for mate in mates] == transports
    with trainer.open(shared.url, f"{name}-alone") as alone:
        for step in range(1, STEPS + 1):
            gradients = trainer.gradients(step)
            expected = alone.step(gradients).digest
            assert together([partial(mate.step, gradients) for mate in mates]) == [expected] * WORLD
        assert alone.members == {}
    assert mates[0].run.members.keys() == {0, 1, 2}
    assert sum(each.connections for each in proxies) > WORLD or not budgets
    for key, whole in trainer.weights.items():
        got = np.zeros_like(whole)
        for mate in mates:
            put(got, mate.weights[key], mate.ranges[key])
        assert got.tobytes() == whole.tobytes()
    for mate in mates:
        mate.run.close()


def test_rows_are_scaled_by_the_elements_that_are_there(shared: Service, name: str) -> None:
    groups = [{"name": "g", "algorithm": "muonclip", "lr": 0.01}]
    attention = {"name": "h", "threshold": 10.0, "query_heads": 2, "head_dim": 2}
    attentions = [{**attention, "query": {"parameter": 0}, "key": {"parameter": 1}}]
    generator = np.random.default_rng(3)
    start = [generator.standard_normal((4, 6)).astype(np.float32) for _ in range(2)]
    gradient = generator.standard_normal((4, 6)).astype(np.float32)
    cuts = [[(0, 9)], [(9, 13), (20, 24)], [(13, 20)]]

    def opened(ranges: Sequence[tuple[int, int]] | None, **options: Any) -> tuple[muond.Run, list[npt.NDArray[Any]]]:
        weights = [w.copy() if ranges is None else part(w, ranges) for w in start]
        parameters = [Parameter(f"p{i}", "g", w, (4, 6), ranges=ranges) for i, w in enumerate(weights)]
        return muond.open_run(
            shared.url, groups=groups, parameters=parameters, attentions=attentions, **options
        ), weights

    alone, whole = opened(None, run=f"{name}-alone")
    members = [opened(ranges, run=name, member=(rank, 3)) for rank, ranges in enumerate(cuts)]
    expected = alone.step([gradient, None], skipped=[1], max_logits={"h": [40.0, 90.0]})
    logits = [[40.0, 1.0], [2.0, 90.0], [1.0, 1.0]]

    def step(rank: int) -> str:
        return (
            members[rank][0]
            .step([part(gradient, cuts[rank]), None], skipped=[1], max_logits={"h": logits[rank]})
            .digest
        )

    assert together([partial(step, rank) for rank in range(3)]) == [expected.digest] * 3
    for i in range(2):
        got = np.zeros((4, 6), np.float32)
        for rank, ranges in enumerate(cuts):
            put(got, members[rank][1][i], ranges)
        assert got.tobytes() == whole[i].tobytes()
    for run in [alone, *(run for run, _ in members)]:
        run.close()


def test_what_does_not_fit_is_told(shared: Service, name: str) -> None:
    with pytest.raises(ValueError, match=r"'w' has shape \[3\], its data has \[4\]"):
        Parameter("w", "g", np.zeros(4, np.float32), (4,), ranges=[(0, 3)]).declaration()
    with pytest.raises(ValueError, match="neither data nor a shape"):
        Parameter("w", "g", np.zeros(3, np.float32), ranges=[(0, 3)]).declaration()
    parameters = [Parameter("w", "g", np.zeros(3, np.float32), (4,), ranges=[(0, 3)])]
    groups = [{"name": "g", "algorithm": "sgd", "lr": 1.0}]
    with muond.open_run(shared.url, run=name, parameters=parameters, groups=groups, member=(0, 1), retries=0) as run:
        with pytest.raises(MuondError, match=r"has shape \[4\], expected \[3\]"):
            run.step([np.ones(4, np.float32)])
        with pytest.raises(MuondError, match=r"no rank has elements \[3,4\) of parameter 'w'") as caught:
            run.step([np.ones(3, np.float32)])
        assert (caught.value.code, caught.value.retryable) == ("RANGE_MISSING", True)


def test_ranges_count_positions_and_offsets() -> None:
    ranges = Ranges([(2, 5), (5, 6), (9, 12)])
    assert ranges.size == 7
    in_bytes = ranges.in_bytes("float32")
    assert [in_bytes.offset(4 * i) for i in range(8)] == [8, 12, 16, 20, 36, 40, 44, 48]
    assert in_bytes.offset(13) == 21
    assert ranges.elements(slice(1, 7)).tolist() == [3, 4, 5, 9, 10, 11]
    assert (Ranges([]).size, Ranges([]).in_bytes("float32").offset(0)) == (0, 0)
