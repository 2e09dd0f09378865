"""A service that is killed and started again: the run goes on without a changed bit, or says to which step to go back."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import muond
from muond import MuondError
from service import Proxy, Service, damage, limit_file_size
from trainer import QUICK, Trainer

STEPS = 4
# A service takes seconds to start.
PATIENT = muond.Backoff(first_seconds=0.05, most_seconds=0.5)
RETRIES = 400


@pytest.fixture(scope="module")
def alone(shared: Service) -> tuple[str, bytes]:
    """Digest and weights of a run that nothing happens to."""
    trainer = Trainer()
    with trainer.open(shared.url, "durability-alone") as run:
        return trainer.train(run, STEPS), trainer.bytes()


def test_a_kill_between_two_steps_changes_nothing_with_a_journal(
    durable: Callable[..., Service], name: str, alone: tuple[str, bytes]
) -> None:
    service = durable("--durability", "journal")
    trainer = Trainer()
    with trainer.open(service.url, name, backoff=PATIENT, retries=RETRIES) as run:
        for step in range(1, STEPS + 1):
            receipt = run.step(trainer.gradients(step))
            assert receipt.durable
            if step == 2:
                service.kill_and_restart()
        assert (run.digest, trainer.bytes()) == alone
        assert run.opened["resumed"]


@pytest.mark.parametrize("budget", [20_000, 41_000, 62_500, 77_777, 100_000, 123_456])
def test_a_kill_anywhere_changes_nothing_with_a_journal(
    durable: Callable[..., Service],
    proxy: Callable[..., Proxy],
    name: str,
    alone: tuple[str, bytes],
    budget: int,
) -> None:
    service = durable("--durability", "journal")
    trainer = Trainer()
    cutting = proxy(service.port, [budget], service.kill_and_restart)
    with trainer.open(
        cutting.url, name, backoff=PATIENT, retries=RETRIES, chunk_bytes=5_000, transport="websocket"
    ) as run:
        assert trainer.train(run, STEPS) == alone[0]
    assert trainer.bytes() == alone[1]
    assert cutting.connections > 1


def test_without_a_journal_the_error_names_the_step_to_return_to(
    durable: Callable[..., Service], name: str, alone: tuple[str, bytes]
) -> None:
    service = durable()
    trainer = Trainer()
    with trainer.open(service.url, name, backoff=PATIENT, retries=RETRIES) as run:
        trainer.train(run, 2)
        kept = run.checkpoint("mine")
        assert (kept.step, kept.digest) == (2, run.digest)
        weights = {key: array.copy() for key, array in trainer.weights.items()}
        trainer.train(run, 1)
        assert run.opened["step"] == 0
        service.kill_and_restart()
        words = "resumed at step 2, this client is at step 3: go back to your weights of step 2 and open it again"
        # It stays so, whatever the run is asked for.
        for act in (lambda: run.checkpoint(), lambda: trainer.train(run, 1), lambda: run.checkpoint()):
            with pytest.raises(MuondError, match=words) as caught:
                act()
            assert (caught.value.code, caught.value.fields.expected_step) == ("STEP_CONFLICT", 3)
        for key, array in trainer.weights.items():
            array[...] = weights[key]
        run.reopen()
        assert (run.step_count, run.digest) == (2, kept.digest)
        trainer.train(run, STEPS - 2)
        assert (run.digest, trainer.bytes()) == alone


def test_going_back_to_a_checkpoint_drops_what_came_after_and_has_no_tag(
    durable: Callable[..., Service], name: str, alone: tuple[str, bytes]
) -> None:
    service = durable("--durability", "journal")
    trainer = Trainer()

    def kept() -> dict[str, npt.NDArray[np.float32]]:
        return {key: array.copy() for key, array in trainer.weights.items()}

    def put_back(weights: dict[str, npt.NDArray[np.float32]]) -> None:
        for key, array in trainer.weights.items():
            array[...] = weights[key]

    with trainer.open(service.url, name, backoff=PATIENT, retries=RETRIES) as run:
        trainer.train(run, 1)
        run.checkpoint("one")
        weights = kept()
        trainer.train(run, 1)
        two = run.checkpoint()
        trainer.train(run, 1)
        three = run.checkpoint("three")
        later = kept()
        # While the service is away, this waits for it as a step does.
        service.kill()
        again = threading.Thread(target=service.restart)
        again.start()
        run.reopen("one")
        again.join()
        assert run.step_count == 1
        put_back(weights)
        with pytest.raises(MuondError, match=f"has no checkpoint '{two.id}'") as caught:
            run.reopen(two.id)
        assert caught.value.code == "NOT_FOUND"
        run.reopen()
        trainer.train(run, 1)
        run.reopen("three")
        assert (run.step_count, run.digest) == (3, three.digest)
        put_back(later)
        trainer.train(run, STEPS - 3)
        assert (run.digest, trainer.bytes()) == alone


def test_a_checkpoint_that_cannot_be_written_is_asked_for_again(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    failures: list[int] = []

    def random() -> float:
        failures.append(1)
        if len(failures) == 2:
            limit_file_size(service, resource.RLIM_INFINITY)
        return 0.0

    trainer = Trainer()
    backoff = muond.Backoff(0.001, 0.001, random)
    with trainer.open(service.url, name, backoff=backoff) as run:
        trainer.train(run, 1)
        limit_file_size(service, 100)
        assert run.checkpoint("after all").step == 1
        assert len(failures) == 2
        limit_file_size(service, 100)
        run._writer._host = replace(run._writer._host, retries=0)
        trainer.train(run, 1)
        with pytest.raises(MuondError, match="cannot be written") as caught:
            run.checkpoint()
        assert (caught.value.code, caught.value.retryable) == ("STORAGE_FAILED", True)


def test_a_step_that_cannot_be_journaled_is_sent_again(
    durable: Callable[..., Service], name: str, alone: tuple[str, bytes]
) -> None:
    service = durable("--durability", "journal")
    failures: list[int] = []

    def random() -> float:
        failures.append(1)
        limit_file_size(service, resource.RLIM_INFINITY)
        return 0.0

    trainer = Trainer()
    with trainer.open(service.url, name, backoff=muond.Backoff(0.001, 0.001, random)) as run:
        trainer.train(run, 2)
        limit_file_size(service, 100)
        trainer.train(run, STEPS - 2)
        assert failures
        assert (run.digest, trainer.bytes()) == alone


def test_without_a_data_folder_a_checkpoint_is_refused_and_training_goes_on(
    shared: Service, name: str, alone: tuple[str, bytes]
) -> None:
    trainer = Trainer()
    with trainer.open(shared.url, name, backoff=QUICK) as run:
        trainer.train(run, 2)
        with pytest.raises(MuondError, match="keeps no checkpoints: it was started without a data folder") as caught:
            run.checkpoint()
        assert caught.value.code == "PARAMETER_INVALID"
        trainer.train(run, STEPS - 2)
        assert (run.digest, trainer.bytes()) == alone


def test_a_run_whose_files_were_changed_is_refused_and_an_older_checkpoint_is_the_way_on(
    durable: Callable[..., Service], name: str, tmp_path: Path
) -> None:
    service = durable()
    trainer = Trainer()
    with trainer.open(service.url, name, backoff=PATIENT, retries=RETRIES) as run:
        trainer.train(run, 1)
        older = run.checkpoint("older")
        trainer.train(run, 1)
        newest = run.checkpoint()
        service.kill()
        damage(tmp_path, name, newest.id)
        service.restart()
        with pytest.raises(MuondError, match="CHECKPOINT_UNREADABLE"):
            trainer.train(run, 1)
        run.reopen("older")
        assert (run.step_count, run.digest) == (1, older.digest)


def test_a_run_branches_from_a_checkpoint_and_comes_back_as_itself(
    durable: Callable[..., Service], name: str, alone: tuple[str, bytes]
) -> None:
    service = durable("--durability", "journal")
    trainer, other = Trainer(), Trainer()
    with trainer.open(service.url, name) as run:
        trainer.train(run, 2)
        half = run.checkpoint("half")
        other.weights = {key: array.copy() for key, array in trainer.weights.items()}
        with other.open(service.url, f"{name}-b", branch_of=(name, "half"), backoff=PATIENT, retries=RETRIES) as branch:
            assert (branch.step_count, branch.digest, branch.opened["resumed"]) == (2, half.digest, False)
            other.train(branch, 1)
            service.kill_and_restart()
            assert other.train(branch, 1) == alone[0]
            assert (branch.name, branch.opened["resumed"]) == (f"{name}-b", True)
    assert other.bytes() == alone[1]
    with pytest.raises(MuondError, match="goes with mode create, mode is resume") as caught:
        Trainer().open(service.url, f"{name}-c", mode="resume", branch_of=(name, "half"))
    assert caught.value.code == "PARAMETER_INVALID"
