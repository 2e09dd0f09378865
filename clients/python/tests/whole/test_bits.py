"""A run over several processes has the bits of one: weights, receipts, digests, for any number of shards and ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import muond
from cluster import Cluster
from muond import MuondError, Parameter, Receipt
from muond.transport.address import Endpoint
from service import Service, build
from trainer import GROUPS, QUICK, SHAPES, Trainer

STEPS = 3
# What differs from run to run.
_TIMES = ("seconds",)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    build()
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 2)
    yield cluster
    cluster.stop()


def said(receipt: Receipt) -> dict[str, Any]:
    return {key: value for key, value in vars(receipt).items() if key not in _TIMES}


def trained(run: muond.Run, trainer: Trainer) -> list[dict[str, Any]]:
    """Receipts of steps with other rates, a scale, and parameters without a gradient."""
    receipts: list[Receipt] = []
    for step in range(1, STEPS + 1):
        gradients = trainer.gradients(step)
        skipped = ["bias", "up"][: step - 1]
        for key in skipped:
            del gradients[key]
        rates = {"matrices": {"lr": 0.02 / step}, "rest": {"weight_decay": 0.1 * step}}
        if step == 2:
            run.begin(groups=rates, gradient_scale=0.5)
            for key in reversed(gradients):
                run.gradient(key, gradients[key])
            receipts.append(run.end(skipped=skipped))
        else:
            receipts.append(run.step(gradients, skipped=skipped, groups=rates, gradient_scale=0.5))
    return [said(receipt) for receipt in receipts]


@pytest.fixture(scope="module")
def alone(shared: Service) -> tuple[list[dict[str, Any]], bytes]:
    trainer = Trainer()
    with trainer.open(shared.url, "bits-alone") as run:
        return trained(run, trainer), trainer.bytes()


@pytest.mark.parametrize(
    ("shards", "transport"), [(0, "auto"), (1, "auto"), (2, "auto"), (4, "auto"), (2, "websocket"), (4, "websocket")]
)
def test_shards_have_the_bits_of_one_process(
    cluster: Cluster, name: str, shards: int, transport: str, alone: tuple[list[dict[str, Any]], bytes]
) -> None:
    trainer = Trainer()
    # Whichever process is asked, the run is found.
    with trainer.open(cluster.urls[shards // 2 % 2], name, shards=shards, transport=transport) as run:
        assert run.is_whole == (shards > 1)
        assert len(run.opened.get("shards", ["itself"])) == max(shards, 1)
        assert run.transport == ("shm" if transport == "auto" else transport)
        assert run.name == name
        assert (trained(run, trainer), trainer.bytes()) == alone
    for url in cluster.urls:
        with trainer.open(url, name, mode="resume") as run:
            assert (run.step_count, run.digest, run.ahead) == (STEPS, alone[0][-1]["digest"], [])


def test_memory_is_shared_with_processes_of_this_host_and_the_others_are_sent_to(
    cluster: Cluster, name: str, alone: tuple[list[dict[str, Any]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = cluster.services[1].port
    monkeypatch.setattr(Endpoint, "is_loopback", property(lambda endpoint: endpoint.port != remote))
    trainer = Trainer()
    with trainer.open(cluster.urls, name, shards=2) as run:
        assert run.transport == "shm+websocket"
        assert (trained(run, trainer), trainer.bytes()) == alone


def test_more_shards_than_parameters_are_refused_and_none_of_it_stays(cluster: Cluster, name: str) -> None:
    with pytest.raises(MuondError, match="cannot be cut into 5 shards"):
        Trainer().open(cluster.urls[0], name, shards=5)
    with Trainer().open(cluster.urls[0], name, shards=2, mode="create") as run:
        assert run.step_count == 0


def test_a_process_alone_has_one_shard_and_refuses_more(shared: Service, name: str) -> None:
    with Trainer().open(shared.url, name, shards=1) as run:
        assert not run.is_whole
    with pytest.raises(MuondError, match="PARAMETER_INVALID"):
        Trainer().open(shared.url, f"{name}-2", shards=2)
    with pytest.raises(ValueError, match="shards is -1, at least 0"):
        Trainer().open(shared.url, name, shards=-1)


HALVES = {
    key: [(0, max(array.size // 2, 1)), (max(array.size // 2, 1), array.size)]
    for key, array in Trainer().weights.items()
}


class Mate:
    """One of two ranks, with half of every tensor; a scalar is the first one's."""

    def __init__(self, url: str, run: str, rank: int, **options: Any) -> None:
        self.ranges = {key: [one for one in HALVES[key][rank : rank + 1] if one[0] < one[1]] for key in SHAPES}
        self.weights = {key: self.part(array, key) for key, array in Trainer().weights.items()}
        parameters = [
            Parameter(key, "matrices" if len(shape) == 2 else "rest", self.weights[key], shape, ranges=self.ranges[key])
            for key, shape in SHAPES.items()
        ]
        options = {"groups": GROUPS, "backoff": QUICK, **options}
        self.run = muond.open_run(url, run=run, parameters=parameters, member=(rank, 2), **options)

    def part(self, whole: npt.NDArray[Any], key: str) -> npt.NDArray[Any]:
        flat = np.asarray(whole).reshape(-1)
        return np.concatenate([flat[:0], *(flat[start:stop] for start, stop in self.ranges[key])])

    def step(self, gradients: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
        return said(self.run.step({key: self.part(array, key) for key, array in gradients.items()}))


@pytest.mark.parametrize("shards", [2, 4])
def test_ranks_and_shards_have_the_bits_of_one_trainer(
    shared: Service, cluster: Cluster, name: str, shards: int
) -> None:
    trainer = Trainer()
    mates = [Mate(cluster.urls[rank], name, rank, shards=shards) for rank in range(2)]
    assert [mate.run.is_whole for mate in mates] == [True, True]
    with trainer.open(shared.url, name) as run, ThreadPoolExecutor(2) as pool:
        for step in range(1, STEPS + 1):
            gradients = trainer.gradients(step)
            steps = [partial(mate.step, gradients) for mate in mates]
            expected = said(run.step(gradients))
            assert list(pool.map(lambda take: take(), steps)) == [expected, expected]
    for key, array in trainer.weights.items():
        parts = [mate.weights[key] for mate in mates]
        np.testing.assert_array_equal(np.concatenate(parts), array.reshape(-1))
    assert mates[0].run.members == {0: True, 1: True}
    for mate in mates:
        mate.run.close()


def attending(url: str, run: str, **options: Any) -> tuple[muond.Run, list[npt.NDArray[np.float32]]]:
    """A run with two attentions, each of two parameters, and one parameter in neither."""
    generator = np.random.default_rng(3)
    weights = [generator.standard_normal((8, 6)).astype(np.float32) for _ in range(5)]
    attentions = [
        {
            "name": f"h.{i}",
            "query_heads": 2,
            "head_dim": 4,
            "threshold": 1.0,
            "query": {"parameter": i},
            "key": {"parameter": 4 - i},
        }
        for i in range(2)
    ]
    parameters = [Parameter(f"w{i}", "all", array) for i, array in enumerate(weights)]
    groups = [{"name": "all", "algorithm": "muon", "lr": 0.02}]
    return muond.open_run(url, run=run, parameters=parameters, groups=groups, attentions=attentions, **options), weights


def test_qk_clip_is_told_to_the_shard_that_has_the_attention(shared: Service, cluster: Cluster, name: str) -> None:
    one, mine = attending(shared.url, name)
    with one:
        for shards in (2, 3):
            many, theirs = attending(cluster.urls[0], f"{name}-{shards}", shards=shards)
            with many:
                generator = np.random.default_rng(4)
                if shards == 3:
                    one.close()
                    one, mine = attending(shared.url, f"{name}-3")
                for _ in range(2):
                    gradients = [generator.standard_normal((8, 6)).astype(np.float32) for _ in range(5)]
                    logits = {"h.0": [4.0, 0.5], "h.1": [0.25, 9.0]}
                    expected = one.step(gradients, max_logits=logits)
                    assert expected.clipped_heads == {"h.0": 1, "h.1": 1}
                    assert said(many.step(gradients, max_logits=logits)) == said(expected)
                with pytest.raises(MuondError, match="MAX_LOGITS_INVALID"):
                    many.step(gradients, max_logits={"h.9": [1.0, 1.0]})
                assert (
                    many.step(gradients, max_logits={"h.1": [1.0, 1.0]}).digest
                    == one.step(gradients, max_logits={"h.1": [1.0, 1.0]}).digest
                )
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(a, b)
    one.close()


@pytest.mark.parametrize("bad", [["up"], ["up", "down", "bias", "scale"], ["scale", "down"]])
def test_a_gradient_that_is_refused_is_named_and_the_step_can_be_taken_again(
    shared: Service, cluster: Cluster, name: str, bad: list[str]
) -> None:
    alone, trainer = Trainer(), Trainer()
    with alone.open(shared.url, name) as one, trainer.open(cluster.urls[0], name, shards=4) as run:
        for each in (alone.train(one, 1), trainer.train(run, 1)):
            assert each
        good = trainer.gradients(2)
        spoilt = {key: np.full_like(array, np.nan) if key in bad else array for key, array in good.items()}
        for _ in range(2):
            with pytest.raises(MuondError) as caught:
                run.step(spoilt)
            assert (caught.value.code, set(caught.value.fields.refused)) == ("GRADIENT_NOT_FINITE", set(bad))
            assert run.parameters[caught.value.fields.parameter or 0].name == caught.value.fields.refused[0]
        assert run.step(good).digest == one.step(good).digest
        spoilt = {
            key: np.full_like(array, np.nan) if key in bad else array for key, array in trainer.gradients(3).items()
        }
        receipt, expected = (each.step(spoilt, skip_refused=True) for each in (run, one))
        assert receipt.digest == expected.digest
        assert {error.fields.parameter for error in receipt.refused} == {
            error.fields.parameter for error in expected.refused
        }
    assert trainer.bytes() == alone.bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"member": (0, 1, 0, 2)}, "cannot have replicas"),
        ({"member": (0, 1, 0, 2), "quorum": (1, 1.0)}, "cannot have replicas, a quorum"),
        ({"branch_of": ("other", "tag")}, "begins with"),
    ],
)
def test_what_a_run_over_several_processes_cannot_have_is_refused_by_name(
    cluster: Cluster, name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(MuondError, match=words) as caught:
        Trainer().open(cluster.urls[0], name, shards=2, **options)
    assert caught.value.code == "PARAMETER_INVALID"


def test_state_is_not_imported_into_shards(cluster: Cluster, name: str) -> None:
    with (
        Trainer().open(cluster.urls[0], name, shards=2) as run,
        pytest.raises(MuondError, match="which 2 processes have together"),
    ):
        run.import_state([], {})


def test_a_run_has_one_trainer_and_who_takes_it_over_keeps_it(cluster: Cluster, name: str) -> None:
    first, second = Trainer(), Trainer()
    run = first.open(cluster.urls[0], name, shards=2)
    with run:
        first.train(run, 1)
        with pytest.raises(MuondError, match="RUN_BUSY"):
            second.open(cluster.urls[1], name)
        with second.open(cluster.urls[1], name, takeover=True, mode="resume") as other:
            second.weights = first.weights
            assert (other.step_count, other.digest) == (1, run.digest)
            for _ in range(2):
                with pytest.raises(MuondError, match="TAKEN_OVER"):
                    first.train(run, 1)
            second.train(other, 1)


def test_a_run_released_between_steps_goes_on_after_it_was_opened_again(
    cluster: Cluster, name: str, alone: tuple[list[dict[str, Any]], bytes]
) -> None:
    trainer = Trainer()
    with trainer.open(cluster.urls[0], name, shards=2) as run:
        run.release()
        with pytest.raises(MuondError, match="CLIENT_CLOSED"):
            trainer.train(run, 1)
        run.reopen()
        run.begin(groups={"matrices": {"lr": 0.02}, "rest": {"weight_decay": 0.1}}, gradient_scale=0.5)
        run.gradient("up", trainer.gradients(1)["up"])
        run.reopen()
        # A shard may have this gradient already.
        assert run.step_count == 0
        assert (trained(run, trainer), trainer.bytes()) == alone
    with pytest.raises(MuondError, match="was closed"):
        run.step({})


@pytest.mark.parametrize("begun", [False, True])
def test_a_step_left_in_the_middle_is_settled(cluster: Cluster, name: str, *, begun: bool) -> None:
    trainer = Trainer()
    run = trainer.open(cluster.urls[0], name, shards=2)
    writer: Any = run._writer
    first, second = ([run.parameters[index].name for index in indices] for indices in writer.cut.indices)
    gradients = trainer.gradients(1)
    # The first shard ends the step, the second has none of its gradients, or one too few.
    applied = second[:-1] if begun else []
    for key in second[len(applied) :]:
        gradients[key] = np.full_like(gradients[key], np.inf)
    with run, pytest.raises(MuondError, match="GRADIENT_NOT_FINITE"):
        run.step(gradients)
    with trainer.open(cluster.urls[1], name, mode="resume") as run:
        ahead = [*first, *applied]
        assert [run.parameters[index].name for index in run.ahead] == sorted(ahead, key=list(SHAPES).index)
        with run.rest() as rest:
            assert rest.run(name)["ahead"] == run.ahead
            with pytest.raises(MuondError, match="between two steps"):
                rest.state(name)
        assert set(run.settle()) == set(ahead)
        assert (run.step_count, list(run.ahead)) == (1, [])
        assert run.step(trainer.gradients(2)).step == 2


def test_a_closed_step_fails(cluster: Cluster, name: str) -> None:
    trainer = Trainer()
    run = trainer.open(cluster.urls[0], name, shards=2)
    run.begin()
    run.close()
    with pytest.raises(MuondError, match="CLIENT_CLOSED"):
        run.end(skipped=list(SHAPES))


def test_no_thread_and_no_warning_is_left(cluster: Cluster, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer().open(cluster.urls[0], name, shards=4).close()
