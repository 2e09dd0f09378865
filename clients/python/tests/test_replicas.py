"""Replicas of one run: every step is made with the mean of what they send, and who is late has what the others have."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
import pytest

import muond
from muond import Member, MuondError, Parameter, Quorum
from muond.steps.owed import merge_groups, owed_groups
from service import Proxy, Service
from test_members import together
from trainer import QUICK

Array = npt.NDArray[np.float32]
GROUPS = [
    {"name": "m", "algorithm": "muon", "lr": 0.02},
    {"name": "s", "algorithm": "sgd", "lr": 0.1, "momentum": 0.9},
]
SHAPES: dict[str, tuple[int, ...]] = {"w": (6, 4), "b": (5,)}
PATIENT = Quorum(min_replicas=1, deadline_seconds=3600)


def gradients(replica: int, step: int) -> dict[str, Array]:
    generator = np.random.default_rng(100 * replica + step)
    return {key: generator.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


def mean(sent: list[Array], weights: list[float]) -> Array:
    """As docs/protocol.md has it: every operation rounded to float32."""
    shares = [np.float32(weight / sum(weights)) for weight in weights]
    total = shares[0] * sent[0]
    for share, values in zip(shares[1:], sent[1:], strict=True):
        total = total + share * values
    return total


class Replica:
    def __init__(self, url: str, name: str, member: Member | None, **options: Any) -> None:
        generator = np.random.default_rng(4)
        self.weights = {k: generator.standard_normal(shape).astype(np.float32) for k, shape in SHAPES.items()}
        parameters = [Parameter(key, "ms"[len(shape) == 1], self.weights[key]) for key, shape in SHAPES.items()]
        options = {"groups": GROUPS, "backoff": QUICK, **options}
        self.run = muond.open_run(url, run=name, parameters=parameters, member=member, **options)

    def same_weights(self, other: Replica) -> bool:
        return all(np.array_equal(self.weights[key], other.weights[key]) for key in SHAPES)


def connected(run: muond.Run, key: tuple[int, int], is_there: bool) -> None:
    deadline = time.monotonic() + 30
    while run.members[key] is not is_there:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ended(service: Service, name: str, replica: int) -> None:
    """Waits for the `end` of a replica."""
    deadline = time.monotonic() + 30
    url = f"http://127.0.0.1:{service.port}/v1/runs/{name}"
    while not any(one["ended"] for one in json.load(urlopen(url))["members"] if one["replica"] == replica):
        assert time.monotonic() < deadline


def test_replicas_train_with_the_mean_over_connections_that_break(
    shared: Service, proxy: Callable[..., Proxy], name: str
) -> None:
    sole = Replica(shared.url, f"{name}-alone", None)
    urls = [proxy(shared.port, [2_600, 2_200 + 300 * replica]).url for replica in range(3)]
    replicas = [Replica(url, name, Member(0, 1, r, 3), retries=30, transport="websocket") for r, url in enumerate(urls)]
    assert replicas[2].run.members[2, 0]
    for step in (1, 2, 3):
        sent = [gradients(r, step) for r in range(3)]
        sole.run.step({key: mean([each[key] for each in sent], [1, 2, 3]) for key in SHAPES})
        receipts = together([partial(one.run.step, sent[r], weight=r + 1) for r, one in enumerate(replicas)])
        assert {receipt.digest for receipt in receipts} == {replicas[0].run.digest}
        assert all(receipt.contributed for receipt in receipts)
        assert [one["weight"] for one in receipts[0].contributors] == [1, 2, 3]
    for replica in replicas:
        assert replica.same_weights(sole)
        replica.run.close()
    sole.run.close()


def test_who_is_late_has_the_same_weights_and_says_its_hyperparameters_again(
    shared: Service, proxy: Callable[..., Proxy], name: str
) -> None:
    way = proxy(shared.port)
    zero = Replica(shared.url, name, Member(0, 1, 0, 2), quorum=PATIENT)
    one = Replica(way.url, name, Member(0, 1, 1, 2))
    way.cut()
    connected(zero.run, (1, 0), False)
    assert zero.run.step(gradients(0, 1)).contributors == [{"replica": 0, "weight": 1.0}]
    # Its connection is replaced, and it takes the step that the others have taken.
    receipt = one.run.step(gradients(1, 1), groups={"m": {"lr": 0.5}, "s": {"lr": 0.1}})
    assert not receipt.contributed
    assert receipt.step == 1
    assert one.same_weights(zero)
    two = together([lambda: zero.run.step(gradients(0, 2)), lambda: one.run.step(gradients(1, 2))])
    assert all(receipt.contributed and receipt.groups["m"]["lr"] == 0.5 for receipt in two)
    assert one.same_weights(zero)


def refusals(service: Service, run: str) -> list[str]:
    with urlopen(f"{service.url.replace('ws', 'http')}/v1/runs/{run}/refusals") as answer:
        return [refusal["code"] for refusal in json.load(answer)["refusals"]]


def test_a_quorum_that_does_not_come_is_waited_for_as_often_as_it_may_be_retried(shared: Service, name: str) -> None:
    quorum = (2, 0.01)
    zero = Replica(shared.url, name, Member(0, 1, 0, 2), quorum=quorum, retries=2)
    one = Replica(shared.url, name, Member(0, 1, 1, 2), quorum=quorum, retries=1000)
    lost = len(refusals(shared, name))
    with pytest.raises(MuondError, match=r"1 replicas have ended step 1 within 0\.01 seconds") as raised:
        zero.run.step(gradients(0, 1))
    assert raised.value.code == "QUORUM_LOST"
    assert len(refusals(shared, name)) == lost + 3, "once, and two retries"
    receipts = together([lambda: zero.run.step(gradients(0, 1)), lambda: one.run.step(gradients(1, 1))])
    assert all(receipt.contributed for receipt in receipts)
    assert one.same_weights(zero)


def test_nan_is_refused_to_its_own_replica(shared: Service, name: str) -> None:
    zero = Replica(shared.url, name, Member(0, 1, 0, 2))
    one = Replica(shared.url, name, Member(0, 1, 1, 2))
    zero.run.begin()
    for key, gradient in gradients(0, 1).items():
        zero.run.gradient(key, gradient)
    bad = {**gradients(1, 1), "w": np.full((6, 4), np.nan, np.float32)}
    with pytest.raises(MuondError, match="rank 0 of replica 1") as raised:
        one.run.step(bad)
    assert (raised.value.code, raised.value.fields.refused) == ("GRADIENT_NOT_FINITE", ("w",))
    receipts = together([zero.run.end, lambda: one.run.step(gradients(1, 1))])
    assert [receipt.applied for receipt in receipts] == [2, 2]


def test_what_one_replica_leaves_out_all_have_to_leave_out(shared: Service, name: str) -> None:
    zero = Replica(shared.url, name, Member(0, 1, 0, 2))
    one = Replica(shared.url, name, Member(0, 1, 1, 2))

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(zero.run.step, gradients(0, 1))
        ended(shared, name, 0)
        bad = {**gradients(1, 1), "w": np.full((6, 4), np.nan, np.float32)}
        with pytest.raises(MuondError, match=r"'w' is sent by replica 0 and skipped by replica 1") as raised:
            one.run.step(bad, skip_refused=True)
        assert raised.value.code == "STEP_CONFLICT"
        assert one.run.step(gradients(1, 1)).applied == first.result().applied == 2
    assert one.same_weights(zero)


def test_only_what_is_not_in_force_is_said_again() -> None:
    in_force = {"g": {"lr": 1.0, "betas": [0.9, 0.95]}}
    assert owed_groups({"g": {"lr": 1.0, "betas": (0.9, 0.95)}}, in_force) == {}
    assert owed_groups({"g": {"lr": 2.0}, "h": {}}, in_force) == {"g": {"lr": 2.0}}
    assert merge_groups({}, None) is None
    assert merge_groups({"g": {"lr": 2.0, "momentum": 0.9}}, {"g": {"lr": 3.0}, "h": {"lr": 4.0}}) == {
        "g": {"lr": 3.0, "momentum": 0.9},
        "h": {"lr": 4.0},
    }
    assert merge_groups({"g": {"lr": 2.0}}, None) == {"g": {"lr": 2.0}}
