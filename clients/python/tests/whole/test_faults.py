"""Processes of a cluster that are killed and started again: the run goes on without a changed bit, or says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import muond
from cluster import Cluster
from muond import MuondError
from muond.rest import Rest
from muond.transport.address import endpoint
from muond.whole.writer import WholeWriter
from service import Proxy, Service, build
from trainer import Trainer

STEPS = 4
# A service takes seconds to start.
PATIENT: dict[str, Any] = {"backoff": muond.Backoff(first_seconds=0.05, most_seconds=0.2), "retries": 400}


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Two processes that keep what they have on the disk."""
    build()
    clusters: list[Cluster] = []

    def begin(*flags: str) -> Cluster:
        clusters.append(Cluster(tmp_path, 2, *flags, data=True))
        return clusters[-1]

    yield begin
    for cluster in clusters:
        cluster.stop()


@pytest.fixture(scope="module")
def alone(shared: Service) -> tuple[str, bytes]:
    """Digest and weights of a run that nothing happens to."""
    trainer = Trainer()
    with trainer.open(shared.url, "faults-alone") as run:
        return trainer.train(run, STEPS), trainer.bytes()


def test_processes_killed_in_the_middle_of_a_step_change_nothing_with_a_journal(
    durable: Callable[..., Cluster], name: str, alone: tuple[str, bytes]
) -> None:
    cluster = durable("--durability", "journal")
    dead = "ws://127.0.0.1:9"
    trainer = Trainer()
    with trainer.open([dead, *cluster.urls], name, shards=2, **PATIENT) as run:
        # The head has the first shard.
        head = cluster.at(run.address.port)
        other = next(service for service in cluster.services if service is not head)
        writer: Any = run._writer
        first, second = writer.cut.indices
        trainer.train(run, 1)
        for killed, indices in ((other, second), (head, first)):
            generation = writer.generation
            gradients = trainer.gradients(run.step_count + 1)
            run.begin()
            run.gradient(indices[0], gradients[run.parameters[indices[0]].name])
            killed.kill_and_restart()
            for key in gradients:
                if key != run.parameters[indices[0]].name:
                    run.gradient(key, gradients[key])
            receipt = run.end()
            assert (receipt.step, receipt.durable) == (run.step_count, True)
            # A head that comes back has another generation, of which the shards are told.
            assert (writer.generation > generation) == (killed is head)
        for service in cluster.services:
            service.kill_and_restart()
        assert (trainer.train(run, 1), trainer.bytes()) == alone
        run.checkpoint("last")
    with trainer.open(cluster.urls, name, mode="resume") as run:
        assert (run.step_count, run.digest) == (STEPS, alone[0])


@pytest.mark.parametrize("seed", range(2))
def test_connections_that_are_cut_anywhere_change_nothing(
    proxy: Callable[..., Proxy], tmp_path: Path, name: str, alone: tuple[str, bytes], seed: int
) -> None:
    build()
    generator = np.random.default_rng(seed)
    proxies: list[Proxy] = []

    def reached(port: int) -> str:
        # Of clients and of processes that ask each other.
        budgets = generator.integers(1_000, 60_000, 12).tolist()
        proxies.append(proxy(port, budgets))
        return proxies[-1].url

    cluster = Cluster(tmp_path, 2, reached=reached)
    try:
        trainer = Trainer()
        with opened(trainer, cluster.urls, name) as run:
            assert (trainer.train(run, STEPS), trainer.bytes()) == alone
        assert min(each.connections for each in proxies) > 1
    finally:
        cluster.stop()


def opened(trainer: Trainer, urls: list[str], name: str) -> muond.Run:
    """A first `open` is not tried again by itself, and may be cut as well."""
    while True:
        try:
            return trainer.open(urls, name, shards=2, takeover=True, transport="websocket", **PATIENT)
        except MuondError as error:
            if not error.retryable:
                raise


def test_a_whole_goes_back_to_a_checkpoint(
    durable: Callable[..., Cluster], name: str, alone: tuple[str, bytes]
) -> None:
    cluster = durable()
    trainer = Trainer()
    with trainer.open(cluster.urls, name, shards=2, **PATIENT) as run:
        trainer.train(run, 2)
        kept = {key: array.copy() for key, array in trainer.weights.items()}
        checkpoint = run.checkpoint("two")
        assert (checkpoint.step, checkpoint.digest) == (2, run.digest)
        assert checkpoint.bytes > 0
        with pytest.raises(MuondError, match="NOT_FOUND"):
            run.reopen("never")
        trainer.train(run, 2)
        assert (run.digest, trainer.bytes()) == alone
        run.reopen(checkpoint.id)
        assert (run.step_count, run.digest) == (2, checkpoint.digest)
        for key, array in trainer.weights.items():
            array[...] = kept[key]
        trainer.train(run, 2)
        assert (run.digest, trainer.bytes()) == alone
    with trainer.open(cluster.urls, name, mode="resume", checkpoint="two") as run:
        assert (run.step_count, run.digest) == (2, checkpoint.digest)
        with run.rest() as rest:
            assert rest.has_checkpoints(name, tagged=True)
            rest.delete(name)
    with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        trainer.open(cluster.urls, name, mode="resume")


def test_a_process_that_has_lost_its_shard_is_said_so(durable: Callable[..., Cluster], name: str) -> None:
    cluster = durable()
    trainer = Trainer()
    with trainer.open(cluster.urls, name, shards=2, **PATIENT) as run:
        trainer.train(run, 1)
        other = next(service for service in cluster.services if service.port != run.address.port)
        other.kill_and_restart()
        with pytest.raises(MuondError) as caught:
            trainer.train(run, 1)
        assert caught.value.code in ("RUN_NOT_FOUND", "STEP_CONFLICT")
        # Without a checkpoint the head has forgotten the run as well.
        for service in cluster.services:
            service.kill()
        with pytest.raises(MuondError, match="CONNECTION_LOST"):
            trainer.open(cluster.urls, name)


def _shards(cluster: Cluster) -> dict[str, int]:
    """The shards that the processes have, and the step of each."""
    found: dict[str, int] = {}
    for url in cluster.urls:
        with Rest(endpoint(url)) as rest:
            found |= {run["name"]: run["step"] for run in rest._json("GET", "/v1/runs")["runs"]}
    return found


def test_an_open_that_fails_deletes_no_shard_that_has_steps(tmp_path: Path, name: str) -> None:
    build()
    cluster = Cluster(tmp_path, 2)
    try:
        trainer = Trainer()
        with trainer.open(cluster.urls, name, shards=2) as run:
            trainer.train(run, 2)
            head = cluster.at(run.address.port)
        # It has no data folder, and so knows of no such run any more: the one that it makes is not that of the shard.
        head.kill_and_restart()
        kept = _shards(cluster)
        assert list(kept.values()) == [2]
        with pytest.raises(MuondError, match="STEP_CONFLICT"):
            trainer.open(cluster.urls, name, shards=2)
        assert _shards(cluster).items() >= kept.items()
    finally:
        cluster.stop()


def test_of_two_trainers_that_make_a_run_the_one_that_is_late_leaves_it_to_the_other(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    cluster = Cluster(tmp_path, 2)
    try:
        first, late = Trainer(), Trainer()
        others: list[muond.Run] = []

        def overtaken(*given: Any) -> WholeWriter:
            """The other one opens the shards while this one has only been told where they are."""
            monkeypatch.undo()
            others.append(first.open(cluster.urls, name, shards=2))
            return WholeWriter(*given)

        monkeypatch.setattr("muond.opening.WholeWriter", overtaken)
        with pytest.raises(MuondError, match="RUN_BUSY"):
            late.open(cluster.urls, name, shards=2, retries=0)
        with others[0] as run:
            first.train(run, 1)
            assert run.step_count == 1
    finally:
        cluster.stop()


def test_a_run_that_no_process_has_room_for_leaves_its_name_free(tmp_path: Path, name: str) -> None:
    build()
    cluster = Cluster(tmp_path, 2, "--state-bytes-limit", "20000")
    try:
        with pytest.raises(MuondError, match="OVER_CAPACITY"):
            Trainer().open(cluster.urls, name, shards=2)
        with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
            Trainer().open(cluster.urls, name, shards=2, mode="resume")
        assert _shards(cluster) == {}
    finally:
        cluster.stop()
