"""A connection may end anywhere: the run ends where an uninterrupted one does, bit for bit, or says why it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import muond
from muond import MuondError, Parameter
from muond.steps.asking import Answer
from muond.steps.updates import Update
from muond.wire.msgpack import encode_head
from peer import ERROR, OPENED, RECEIPT, UPDATE, Peer, Talk
from service import Proxy, Service
from trainer import GROUPS, QUICK, Trainer

STEPS = 4


@pytest.fixture(scope="module")
def alone(shared: Service) -> tuple[str, bytes]:
    """Digest and weights of a run whose connection holds."""
    trainer = Trainer()
    with trainer.open(shared.url, "reconnect-alone") as run:
        return trainer.train(run, STEPS), trainer.bytes()


@pytest.mark.parametrize("budget", [3_000, 20_000, 33_000, 48_000, 61_000, 90_000, 123_456, 200_000])
def test_a_cut_anywhere_changes_nothing(
    shared: Service, proxy: Callable[..., Proxy], name: str, alone: tuple[str, bytes], budget: int
) -> None:
    trainer = Trainer()
    cutting = proxy(shared.port, [budget, 15_000, 40_000, 75_000])
    with trainer.open(cutting.url, name, retries=20, chunk_bytes=5_000, transport="websocket") as run:
        assert trainer.train(run, STEPS) == alone[0]
    assert trainer.bytes() == alone[1]
    assert cutting.connections > 1


def test_many_cuts_at_random_change_nothing(
    shared: Service, proxy: Callable[..., Proxy], name: str, alone: tuple[str, bytes]
) -> None:
    budgets = np.random.default_rng(7).integers(3_000, 80_000, 40).tolist()
    trainer = Trainer()
    with trainer.open(proxy(shared.port, budgets).url, name, retries=50, transport="websocket") as run:
        assert trainer.train(run, STEPS) == alone[0]
    assert trainer.bytes() == alone[1]


def test_a_cut_during_a_backward_pass_is_met_before_it_ends(
    shared: Service, proxy: Callable[..., Proxy], name: str, alone: tuple[str, bytes]
) -> None:
    trainer = Trainer()
    cutting = proxy(shared.port)
    with trainer.open(cutting.url, name) as run:
        for step in range(1, STEPS + 1):
            gradients = trainer.gradients(step)
            for key in gradients:
                run.gradient(key, gradients[key])
                cutting.cut()
            run.end()
        assert run.digest == alone[0]
    assert trainer.bytes() == alone[1]


def test_a_step_that_was_given_up_can_be_taken_again(
    shared: Service, proxy: Callable[..., Proxy], name: str, alone: tuple[str, bytes]
) -> None:
    trainer = Trainer()
    cutting = proxy(shared.port, [40_000, 0, 0, 30_000, 0, 0])
    with trainer.open(cutting.url, name, retries=1, transport="websocket") as run:
        gradients = trainer.gradients(1)
        failures = 0
        while run.step_count == 0:
            try:
                run.step(gradients)
            except MuondError as error:
                assert error.code == "CONNECTION_LOST"  # noqa: PT017 - the loop goes on
                failures += 1
        assert failures > 0
        for step in range(2, STEPS + 1):
            run.step(trainer.gradients(step))
        assert run.digest == alone[0]
    assert trainer.bytes() == alone[1]


def test_a_service_that_is_gone_is_given_up_after_the_retries(start: Callable[..., Service], name: str) -> None:
    service = start()
    waits: list[float] = []

    def random() -> float:
        waits.append(1.0)
        return 0.0

    trainer = Trainer()
    backoff = muond.Backoff(first_seconds=0.001, most_seconds=0.002, random=random)
    run = trainer.open(service.url, name, retries=3, backoff=backoff)
    trainer.train(run, 1)
    service.kill()
    with pytest.raises(MuondError, match="CONNECTION_LOST") as caught:
        run.step(trainer.gradients(2))
    assert caught.value.retryable
    assert len(waits) == 3
    run.close()


def test_a_service_that_lost_the_run_is_told_apart_from_one_that_is_gone(
    start: Callable[..., Service], name: str
) -> None:
    trainer = Trainer()
    service = start()
    run = trainer.open(service.url, name)
    trainer.train(run, 2)
    service.kill()
    start(port=service.port)
    with pytest.raises(
        MuondError, match="it was at step 2 here: was the service restarted without durable state"
    ) as caught:
        run.step(trainer.gradients(3))
    assert caught.value.code == "RUN_NOT_FOUND"
    run.close()


def test_a_service_that_drains_finishes_the_step_and_the_next_one_hears_of_it(
    start: Callable[..., Service], name: str
) -> None:
    trainer = Trainer()
    service = start()
    run = trainer.open(service.url, name, retries=0)
    gradients = trainer.gradients(1)
    first, *others = gradients
    run.gradient(first, gradients[first])
    # Its update is there: the step has begun for the service as well.
    run._events.put(run._events.get(timeout=30))
    service.process.send_signal(signal.SIGTERM)
    service.event("draining")
    for key in others:
        run.gradient(key, gradients[key])
    assert run.end().step == 1
    with pytest.raises(MuondError) as caught:
        run.step(trainer.gradients(2))
    assert caught.value.code in ("DRAINING", "CONNECTION_LOST")
    run.close()


def test_closing_ends_the_wait_for_another_attempt(start: Callable[..., Service], name: str) -> None:
    service = start()
    trainer = Trainer()
    waiting = threading.Event()

    def random() -> float:
        waiting.set()
        return 0.5

    run = trainer.open(service.url, name, backoff=muond.Backoff(first_seconds=600, most_seconds=600, random=random))
    trainer.train(run, 1)
    service.kill()
    errors: list[BaseException] = []

    def step() -> None:
        try:
            run.step(trainer.gradients(2))
        except MuondError as error:
            errors.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    assert waiting.wait(30)
    run.close()
    thread.join(30)
    assert isinstance(errors[0], MuondError)
    assert errors[0].code == "CLIENT_CLOSED"


def interrupting(run: muond.Run, steps: list[int]) -> None:
    """Sends Ctrl-C to this process, in the middle of applying an update, once for each of these steps."""
    apply = run._apply

    def interrupted(updates: Sequence[Update]) -> None:
        assert run._flight is not None
        while run._flight.number in steps:
            steps.remove(run._flight.number)
            os.kill(os.getpid(), signal.SIGINT)
        apply(updates)

    run._apply = interrupted


def test_ctrl_c_during_a_step_finishes_it_first(shared: Service, name: str, alone: tuple[str, bytes]) -> None:
    trainer = Trainer()
    with trainer.open(shared.url, name) as run:
        interrupting(run, [2, 3])
        interrupts = 0
        while run.step_count < STEPS:
            try:
                trainer.train(run, 1)
            except KeyboardInterrupt:
                interrupts += 1
                assert not run.in_flight
        assert run.digest == alone[0]
    assert (interrupts, trainer.bytes()) == (2, alone[1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait(shared: Service, name: str) -> None:
    trainer = Trainer()
    with trainer.open(shared.url, name) as run:
        interrupting(run, [1, 1])
        with pytest.raises(KeyboardInterrupt):
            trainer.train(run, 1)
        assert run.in_flight
        for act in (lambda: run.gradient(0, trainer.gradients(1)["up"]), lambda: trainer.train(run, 1)):
            with pytest.raises(MuondError, match="step 1 was interrupted while its updates were applied"):
                act()
        run.reopen()
        assert trainer.train(run, 1)


def test_an_error_while_the_last_updates_are_applied_leaves_a_run_that_can_be_opened_again(
    shared: Service, name: str
) -> None:
    def broken(_: Sequence[Update]) -> None:
        raise MemoryError

    trainer = Trainer()
    with trainer.open(shared.url, name) as run:
        gradients = trainer.gradients(1)
        for key in gradients:
            run.gradient(key, gradients[key])
        assert run._flight is not None
        run._flight.finish([])
        done = threading.Event()
        # The thread that takes steps comes to this when the receipt is there.
        run._writer._jobs.put(done.set)
        assert done.wait(30)
        apply, run._apply = run._apply, broken
        with pytest.raises(MemoryError):
            run._land()
        assert run.in_flight
        run._apply = apply
        run.reopen()
        assert not run.in_flight


def test_ctrl_c_ends_the_attempts_at_a_step_that_fails(start: Callable[..., Service], name: str) -> None:
    service = start()
    trainer = Trainer()

    def random() -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    with trainer.open(service.url, name, backoff=muond.Backoff(0.01, 0.01, random), retries=10**9) as run:
        trainer.train(run, 1)
        service.kill()
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.train(run, 1)
        assert isinstance(caught.value.__context__, MuondError)
        assert not run.in_flight


def test_a_handler_of_the_trainers_own_is_left_alone(shared: Service, name: str) -> None:
    trainer = Trainer()
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with trainer.open(shared.url, name) as run:
            interrupting(run, [1])
            trainer.train(run, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_a_forked_child_leaves_its_parents_run_alone(shared: Service, name: str, alone: tuple[str, bytes]) -> None:
    trainer = Trainer()
    run = trainer.open(shared.url, name)
    trainer.train(run, 1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run.step(trainer.gradients(2))
        except MuondError as error:
            os.write(write, str(error).encode())
        run.close()
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
    assert f"was opened by process {os.getpid()}, this is {child}" in said
    assert trainer.train(run, STEPS - 1) == alone[0]
    run.close()


def test_a_process_that_forgets_to_close_ends_its_connection_in_order(shared: Service, name: str) -> None:
    script = f"""
        import numpy as np, muond
        w = np.zeros(2, np.float32)
        parameters = [muond.Parameter("w", "g", w)]
        run = muond.open_run({shared.url!r}, run={name!r}, groups=[{{"name": "g", "algorithm": "sgd"}}], parameters=parameters)
        run.step([np.ones(2, np.float32)])
        run.gradient(0, np.ones(2, np.float32))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    again = [Parameter("w", "g", np.zeros(2, np.float32))]
    with muond.open_run(shared.url, run=name, groups=[{"name": "g", "algorithm": "sgd"}], parameters=again) as run:
        assert run.step_count == 1


# What no service of this repository says: the client must not go on as if nothing was wrong.


def step_against(script: Callable[[Talk], None], **options: Any) -> tuple[MuondError | None, list[float], int]:
    """Opens a run of one parameter against a peer and takes a step: the error, the weights, the connections it took."""
    weights = np.zeros(2, np.float32)
    with Peer(script) as peer:
        run = muond.open_run(
            peer.url, run="r", parameters=[Parameter("w", "all", weights)], backoff=QUICK, **{"retries": 2, **options}
        )
        error = None
        try:
            run.step([np.ones(2, np.float32)])
        except MuondError as caught:
            error = caught
        run.close()
        return error, weights.tolist(), peer.connections


ONES = np.ones(2, np.float32).tobytes()


def test_a_peer_that_keeps_to_the_protocol_is_followed() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        assert talk.hear() == {"type": "gradient", "parameter": 0, "step": 1, "offset": 0, "data": ONES}
        assert talk.hear() == {"type": "end", "step": 1}
        talk.say(**UPDATE, data=ONES[:3])
        talk.say(type="update", parameter=0, step=1, data=ONES[3:], offset=3)
        talk.say(type="draining", deadline_seconds=1)
        talk.say(**RECEIPT, later="unknown keys pass")
        talk.until_closed()

    assert step_against(script) == (None, [-1.0, -1.0], 1)


def test_data_that_is_not_the_last_key_is_taken_as_well() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.hear()
        talk.say(data=ONES, **UPDATE)
        talk.say(**RECEIPT)
        talk.until_closed()

    assert step_against(script) == (None, [-1.0, -1.0], 1)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([{**UPDATE, "parameter": 1, "data": ONES}], "update of parameter 1, the run has 1"),
        ([{**UPDATE, "step": 2, "data": ONES}], "step 2, expected 1"),
        ([{**UPDATE, "offset": 4, "data": ONES[:4]}], "offset 4, expected 0"),
        ([{**UPDATE, "data": ONES[:4]}, {**UPDATE, "offset": 2, "data": ONES[:4]}], "offset 2, expected 4"),
        ([{**UPDATE, "data": ONES[:4]}, {**UPDATE, "data": ONES}], "offset 0 again"),
        ([{**UPDATE, "data": ONES[:4]}, UPDATE], "offset 0 and no data"),
        ([{**UPDATE, "offset": 4}], "offset 4 and no data"),
        ([{**UPDATE, "data": ONES + b"1"}], "9 bytes at offset 0, it has 8 in all"),
        ([{**UPDATE, "data": b""}], "0 bytes at offset 0"),
        ([{"type": "update", "parameter": 0, "step": 1, "offset": 0, "data": ONES}], "no scale or decay"),
        ([{**UPDATE, "row_scale": b"123", "data": ONES}], "3 bytes of row scales for 2 elements"),
        ([{**UPDATE, "row_scale": b"", "data": ONES}], "0 bytes of row scales"),
        ([{**UPDATE, "row_scale": bytes(12), "data": ONES}], "12 bytes of row scales for 2 elements"),
        ([RECEIPT], "the receipt of step 1: 'w' has no update yet"),
        ([{**UPDATE, "data": ONES}, {**RECEIPT, "step": 2}], "the receipt of step 2: it is 1"),
        ([OPENED], "the service sent opened during a step"),
        (
            [{"type": "checkpointed", "checkpoint": "1", "step": 1, "digest": "d", "bytes": 1}],
            "sent checkpointed during",
        ),
    ],
)
def test_what_no_service_sends_ends_the_step(frames: list[dict[str, Any]], words: str) -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.hear()
        for frame in frames:
            talk.say(**frame)
        talk.until_closed()

    error, weights, connections = step_against(script)
    assert words in str(error)
    assert weights in ([0.0, 0.0], [-1.0, -1.0])
    assert connections == 1


def test_an_error_that_is_worth_a_retry_is_met_with_a_new_connection() -> None:
    opens: list[dict[str, Any]] = []

    def script(talk: Talk) -> None:
        opens.append(talk.hear())
        talk.say(**OPENED)
        talk.hear()
        talk.hear()
        if talk.number < 2:
            talk.say(**{**ERROR, "code": "OVERLOADED", "status": 429, "retryable": True, "retry_after_seconds": 0.001})
        else:
            talk.say(**UPDATE, data=ONES)
            talk.say(**RECEIPT)
        talk.until_closed()

    assert step_against(script, groups=GROUPS) == (None, [-1.0, -1.0], 3)
    assert [frame.get("takeover") for frame in opens] == [None, True, True]
    assert [frame["mode"] for frame in opens] == ["create_or_resume", "resume", "resume"]
    assert ["groups" in frame for frame in opens] == [True, False, False]


def test_an_error_that_is_not_is_raised_at_once() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.say(**{**ERROR, "code": "STEP_CONFLICT", "status": 409})
        talk.until_closed()

    error, _, connections = step_against(script)
    assert error is not None
    assert (error.code, connections) == ("STEP_CONFLICT", 1)


def test_a_real_step_incomplete_is_raised() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.hear()
        talk.say(**{**ERROR, "code": "STEP_INCOMPLETE", "status": 409, "message": "step 1 lacks 'w'"})
        talk.until_closed()

    error, _, _ = step_against(script)
    assert error is not None
    assert error.code == "STEP_INCOMPLETE"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 5, "digest": "d5"}, "resumed at step 5, this client is at step 0: go back to your weights of step 5"),
        ({"step": 0, "digest": "other"}, "has digest other at step 0, this client has d0"),
    ],
)
def test_a_service_with_another_history_is_not_gone_on_with(change: dict[str, Any], words: str) -> None:
    def script(talk: Talk) -> None:
        talk.opened(**(change if talk.number > 0 else {}))
        if talk.number > 0:
            return talk.until_closed()
        return talk.socket.close(1001)

    error, weights, _ = step_against(script)
    assert error is not None
    assert (error.code, error.fields.expected_step) == ("STEP_CONFLICT", change["step"] + 1)
    assert words in str(error)
    assert weights == [0.0, 0.0]


def test_a_receipt_that_was_lost_is_sent_again() -> None:
    def script(talk: Talk) -> None:
        talk.opened(**({"step": 1, "digest": "d1", "resumed": True} if talk.number else {}))
        talk.hear()
        talk.hear()
        talk.say(**UPDATE, data=ONES, replayed=talk.number > 0)
        if talk.number == 0:
            return talk.socket.close(1001)
        talk.say(**{**RECEIPT, "replayed": True})
        return talk.until_closed()

    assert step_against(script) == (None, [-1.0, -1.0], 2)


def test_a_step_that_was_ended_without_a_refused_gradient_is_not_sent_it_again() -> None:
    """The receipt is lost: the service would refuse the gradient with STEP_CONFLICT, since the step ended without it."""
    refusal = {**ERROR, "code": "GRADIENT_NOT_FINITE", "status": 422, "parameter": 0, "step": 1}
    heard: list[list[str]] = []

    def script(talk: Talk) -> None:
        talk.opened(**({"step": 1, "digest": "d1", "resumed": True} if talk.number else {}))
        heard.append([])
        while (frame := talk.hear()).get("skipped") != [0]:
            heard[-1].append(frame["type"])
            if frame["type"] == "gradient":
                talk.say(**refusal)
            else:
                talk.say(**{**ERROR, "code": "STEP_INCOMPLETE", "status": 409})
        if talk.number == 0:
            return talk.socket.close(1001)
        talk.say(**{**RECEIPT, "replayed": True, "applied": 0, "skipped": 1})
        return talk.until_closed()

    with Peer(script) as peer:
        parameters = [Parameter("w", "all", np.zeros(2, np.float32))]
        with muond.open_run(peer.url, run="r", parameters=parameters, backoff=QUICK, retries=2) as run:
            receipt = run.step([np.full(2, np.nan, np.float32)], skip_refused=True)
    assert [error.fields.parameter for error in receipt.refused] == [0]
    assert heard[1] == [], "the second connection is sent nothing but the end"


def test_a_receipt_right_before_the_end_of_the_connection_counts() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.hear()
        talk.say(**UPDATE, data=ONES)
        talk.say(**RECEIPT)
        talk.socket.close(1012)

    for _ in range(20):
        assert step_against(script, retries=0) == (None, [-1.0, -1.0], 1)


def test_rows_alone_that_come_again_are_scaled_once() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.hear()
        talk.say(**{**UPDATE, "scale": 0, "row_scale": np.full(2, 0.5, np.float32).tobytes()})
        if talk.number == 0:
            return talk.socket.close(1001)
        talk.say_in_fragments(encode_head(RECEIPT, 1), b"1")
        return talk.until_closed()

    weights = np.ones(2, np.float32)
    with Peer(script) as peer:
        parameter = Parameter("w", "all", weights)
        with muond.open_run(peer.url, run="r", parameters=[parameter], backoff=QUICK) as run:
            run.step([np.ones(2, np.float32)])
    assert (weights.tolist(), peer.connections) == ([0.5, 0.5], 2)


def test_an_answer_is_taken_once() -> None:
    answer = Answer("opened")
    answer.frame(OPENED)
    with pytest.raises(MuondError, match="broken"):
        answer.frame(ERROR)
    assert answer.wait("open") == OPENED


def test_an_update_that_was_cut_off_begins_again() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.hear()
        if talk.number == 0:
            talk.say(**UPDATE, data=ONES[:4])
            return talk.socket.close(1001)
        talk.say(**UPDATE, data=ONES)
        talk.say(**RECEIPT)
        return talk.until_closed()

    assert step_against(script) == (None, [-1.0, -1.0], 2)


@pytest.mark.parametrize(
    ("frame", "code", "words"),
    [
        (RECEIPT, "FRAME_UNEXPECTED", "sent receipt outside a step"),
        (ERROR, "INTERNAL", "broken"),
    ],
)
def test_a_wrong_answer_to_open_is_refused(frame: dict[str, Any], code: str, words: str) -> None:
    def script(talk: Talk) -> None:
        talk.hear()
        talk.say(**frame)
        talk.until_closed()

    with Peer(script) as peer, pytest.raises(MuondError, match=words) as caught:
        muond.open_run(peer.url, run="r", parameters=[Parameter("w", "all", np.zeros(2, np.float32))])
    assert caught.value.code == code


def test_a_dtype_that_this_client_does_not_know_is_refused() -> None:
    def script(talk: Talk) -> None:
        talk.hear()
        talk.say(**OPENED)
        talk.until_closed()

    parameter = Parameter("w", "all", np.zeros(2, np.float32), update_dtype="int8")
    with Peer(script) as peer, pytest.raises(MuondError, match="dtype 'int8'") as caught:
        muond.open_run(peer.url, run="r", parameters=[parameter])
    assert caught.value.code == "DTYPE_UNSUPPORTED"


def test_an_open_without_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muond.steps.asking.ANSWER_SECONDS", 0.01)
    with Peer(lambda talk: talk.until_closed()) as peer, pytest.raises(MuondError, match="no answer to open within"):
        muond.open_run(peer.url, run="r", parameters=[])
