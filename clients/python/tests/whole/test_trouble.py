"""What a head and its shards may say or do in the middle of a step, and what a client makes of it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import muond
from muond import MuondError
from muond.transport.address import Addresses, another, endpoint
from muond.transport.arenas import HostArenas
from muond.whole.shares import ShardArenas
from peer import OPENED, RECEIPT
from whole.fake import GRADIENTS, PLACED, Fake, Said

Weights = list[npt.NDArray[np.float32]]
GONE = "ws://127.0.0.1:9"
ALL = {"run": "r~0", "url": GONE, "parameters": [[0, 2]]}


def taken_once(weights: Weights) -> bool:
    return all(np.array_equal(w, -g) for w, g in zip(weights, GRADIENTS, strict=True))


@pytest.mark.parametrize(
    ("placed", "code"),
    [
        ({"shards": [{"run": "r~0", "url": GONE}]}, "FRAME_MALFORMED"),
        ({"shards": [{"run": "r~0", "url": GONE, "parameters": [[0, 1]]}]}, "FRAME_UNEXPECTED"),
        ({"shards": [ALL, {"run": "r~1", "url": GONE, "parameters": []}]}, "FRAME_UNEXPECTED"),
        ({"shards": [{"run": "r~0", "url": "gopher://127.0.0.1", "parameters": [[0, 2]]}]}, "FRAME_UNEXPECTED"),
        ({"shards": [ALL]}, "CONNECTION_LOST"),
        ({"step": 2}, "STEP_CONFLICT"),
        ({"step": 2, "resumed": False}, "STEP_CONFLICT"),
    ],
)
def test_a_placement_that_cannot_be_opened_is_an_error(placed: dict[str, Any], code: str) -> None:
    with Fake() as fake:
        fake.placed = placed
        with pytest.raises(MuondError) as caught:
            fake.open()
        assert caught.value.code == code


def test_a_shard_that_is_refused_leaves_none_open() -> None:
    def refused(said: Said) -> bool:
        said.error("OVER_CAPACITY")
        return True

    with Fake(second=refused) as fake:
        fake.placed = {"resumed": False}
        with pytest.raises(MuondError, match="OVER_CAPACITY"):
            fake.open()


def test_an_address_goes_along_with_the_key_and_never_without_tls_where_there_was_some() -> None:
    asked = endpoint("ws://one", token="t", headers={"a": "b"})
    found = another("http://two:8787", asked)
    assert (found.url, found.token, found.headers) == ("ws://two:8787/v1/stream", "t", {"a": "b"})
    assert another("wss://two", asked).tls
    with pytest.raises(MuondError, match="which has no TLS"):
        another("ws://two", endpoint("wss://one"))
    both = Addresses((asked, found))
    assert (both.led_by(found).endpoints, both.has_loopback) == ((found, asked), False)


def test_a_shard_that_is_none_is_an_error() -> None:
    def placed(said: Said) -> bool:
        said.talk.say(**PLACED, shards=[])
        return True

    with Fake(second=placed) as fake, pytest.raises(MuondError, match="is opened as that of one process"):
        fake.open()


def test_a_shard_that_is_opened_while_the_step_is_given_up_takes_no_part_in_it() -> None:
    opening, given_up = threading.Event(), threading.Event()

    def taken(said: Said) -> bool:
        if said.kind == "end":
            opening.wait(10)
            said.talk.socket.close(4409, "taken")
            return True
        return False

    def lose(said: Said) -> bool:
        if said.kind == "end":
            said.talk.socket.close()
            return True
        if said.number == 2:
            opening.set()
            given_up.wait(10)
        return False

    with Fake(first=taken, second=lose) as fake:
        run, _ = fake.open()
        writer: Any = run._writer
        give_up = writer.shards[1].give_up

        def tell(error: BaseException) -> None:
            give_up(error)
            given_up.set()

        writer.shards[1].give_up = tell
        with run, pytest.raises(MuondError, match="TAKEN_OVER"):
            run.step(GRADIENTS)
        assert given_up.is_set()
        assert fake.ends == {}


def test_a_run_that_is_always_elsewhere_is_given_up() -> None:
    def moved(said: Said) -> None:
        said.talk.say(type="moved", run="r", url=fake.url)

    with Fake(head=moved) as fake:
        with pytest.raises(MuondError, match="said to be elsewhere 4 times"):
            fake.open()
        assert len(fake.opens) == 4


def test_a_head_that_is_lost_is_asked_again_and_no_shard_is() -> None:
    def lose(said: Said) -> bool:
        if said.kind == "end" and said.number < 3:
            said.talk.socket.close()
            return True
        return False

    with Fake(head=lose) as fake:
        run, weights = fake.open()
        with run:
            assert (run.step(GRADIENTS).digest, run.digest) == ("d1", "d1")
            assert taken_once(weights)
            assert run.step(GRADIENTS).step == 2
        assert fake.ends == {"r~0": 2, "r~1": 2}
        assert sorted(frame["run"] for frame in fake.opens) == ["r", "r", "r", "r~0", "r~1"]
        assert [frame["mode"] for frame in fake.opens if frame["run"] == "r"] == [
            "create_or_resume",
            "resume",
            "resume",
        ]


def test_a_shard_that_is_lost_before_all_have_voted_ends_the_step_again() -> None:
    again = threading.Event()
    asked = threading.Event()

    def wait(said: Said) -> bool:
        if said.kind == "end":
            asked.set()
            again.wait(10)
        return False

    def lose(said: Said) -> bool:
        if said.kind == "end" and said.number == 1:
            said.talk.say(**receipt_of("r~1"))
            asked.wait(10)
            said.talk.socket.close()
            return True
        if said.kind == "end":
            again.set()
        return False

    with Fake(head=wait, second=lose) as fake:
        run, weights = fake.open()
        with run:
            assert run.step(GRADIENTS).step == 1
        assert taken_once(weights)
        assert fake.ends == {"r~0": 1, "r~1": 1}
        # The head is asked once, and shards are opened where they were.
        assert sorted(frame["run"] for frame in fake.opens) == ["r", "r~0", "r~1", "r~1"]


def test_a_receipt_is_not_kept_waiting_by_a_shard_that_was_lost_behind_its_vote() -> None:
    again = threading.Event()
    asked = threading.Event()

    def wait(said: Said) -> bool:
        if said.kind == "end" and not again.is_set():
            asked.set()
            again.wait(10)
        return False

    def lose(said: Said) -> bool:
        if said.kind == "end" and said.number == 1:
            said.talk.say(**receipt_of("r~1"))
            asked.wait(10)
            said.talk.socket.close()
            return True
        if said.kind == "end" and said.number == 2:
            # It never says that it has ended the step.
            again.set()
            return True
        return False

    with Fake(head=wait, second=lose) as fake:
        run, weights = fake.open()
        with run:
            assert run.step(GRADIENTS).step == 1
            assert taken_once(weights)
            assert run.step(GRADIENTS).step == 2
        assert fake.ends == {"r~0": 2, "r~1": 1}


def receipt_of(run: str, **changes: Any) -> dict[str, Any]:
    return {**RECEIPT, "digest": f"{run} 1", **changes}


@pytest.mark.parametrize("code", ["PEER_FAILED", "STALE_GENERATION"])
def test_a_head_that_gives_no_receipt_is_given_up_and_the_step_can_be_taken_again(code: str) -> None:
    refusing = True

    def refuse(said: Said) -> bool:
        if said.kind == "end" and refusing:
            said.error(code, retryable=code == "PEER_FAILED")
            return True
        return False

    with Fake(head=refuse) as fake:
        run, weights = fake.open()
        with run:
            for _ in range(2):
                with pytest.raises(MuondError, match=code):
                    run.step(GRADIENTS)
            assert taken_once(weights)
            refusing = False
            # As the ranks of a trainer are told before each step.
            run.moved(run.step_count, run.digest)
            assert run.step(GRADIENTS).step == 1
            assert taken_once(weights)


def test_a_receipt_of_another_step_is_an_error() -> None:
    def wrong(said: Said) -> bool:
        if said.kind == "end":
            said.talk.say(type="draining", deadline_seconds=1.0)
            said.talk.say(**receipt_of("r", step=7))
            return True
        return False

    with Fake(head=wrong) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match="the receipt of step 7: it is 1"):
            run.step(GRADIENTS)


def test_a_frame_that_is_no_receipt_is_an_error() -> None:
    def wrong(said: Said) -> bool:
        if said.kind == "end":
            said.talk.say(type="checkpointed", checkpoint="c", step=1, digest="d", bytes=1)
            return True
        return False

    with Fake(head=wrong) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match="sent checkpointed outside a step"):
            run.step(GRADIENTS)


def test_shards_with_different_hyperparameters_are_no_step() -> None:
    def other(said: Said) -> bool:
        if said.kind == "end":
            said.talk.say(**receipt_of("r~1", groups={"all": {"algorithm": "sgd", "lr": 2.0}}))
            return True
        return False

    with Fake(second=other) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match=r"'all' in shards 0 .*'lr': 1.0.* and 1 .*'lr': 2.0") as caught:
            run.step(GRADIENTS)
        assert (caught.value.code, fake.step) == ("STEP_CONFLICT", 0)


def test_a_newer_generation_is_asked_for_and_all_shards_are_opened_with_it() -> None:
    def stale(said: Said) -> bool:
        if said.kind == "gradient" and said.number == 1:
            fake.placed = {"generation": 2}
            said.error("STALE_GENERATION")
            return True
        return False

    with Fake(second=stale) as fake:
        run, weights = fake.open()
        with run:
            assert run.step(GRADIENTS).step == 1
            assert taken_once(weights)
            assert run.opened["generation"] == 2
        generations = {run: [f["shard"]["generation"] for f in fake.opens if f["run"] == run] for run in ("r~0", "r~1")}
        assert generations == {"r~0": [1, 2], "r~1": [1, 2]}


def test_a_head_that_has_forgotten_the_run_is_said_so() -> None:
    def stale(said: Said) -> bool:
        if said.kind == "gradient":
            said.error("STALE_GENERATION")
            return True
        return False

    def forget(said: Said) -> bool:
        if said.number > 1:
            said.error("RUN_NOT_FOUND", status=404)
            return True
        return False

    with Fake(head=forget, second=stale) as fake:
        run, _ = fake.open()
        with (
            run,
            pytest.raises(MuondError, match="was at step 0 here: was the service restarted without durable state"),
        ):
            run.step(GRADIENTS)


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        ({"step": 3, "digest": "d3"}, "resumed at step 3, this client is at step 0: go back to your weights of step 3"),
        ({"digest": "other"}, "has digest other at step 0, this client has d0"),
        ({"shards": [ALL]}, "have other parameters than"),
        ({"type": "opened", "epoch": 1, "ahead": [], "groups": {}}, "is that of one process now"),
    ],
)
def test_a_whole_that_is_not_what_it_was_is_an_error(placed: dict[str, Any], words: str) -> None:
    def lose(said: Said) -> bool:
        if said.kind == "end":
            fake.placed = placed
            said.talk.socket.close()
            return True
        return False

    with Fake(head=lose) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match=words):
            run.step(GRADIENTS)


def test_a_run_of_one_process_that_has_several_now_is_an_error() -> None:
    def alone(said: Said) -> bool:
        if said.number == 1:
            if said.kind == "open":
                said.talk.say(**OPENED)
            else:
                said.talk.socket.close()
            return True
        return False

    with Fake(head=alone) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match="has several shards now"):
            run.step(GRADIENTS)


def test_a_shard_that_cannot_be_reached_is_given_up_after_the_head_was_asked() -> None:
    def lose(said: Said) -> bool:
        if said.kind != "open" or said.number > 1:
            said.talk.socket.close()
            return True
        return False

    with Fake(second=lose) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match="CONNECTION_LOST"):
            run.step(GRADIENTS)
        assert sum(frame["run"] == "r~1" for frame in fake.opens) == 4
        assert sum(frame["run"] == "r" for frame in fake.opens) == 3
        # Shards that were through with the step are not asked again.
        assert fake.ends["r~0"] == 1


def test_a_head_that_cannot_be_reached_is_given_up() -> None:
    def lose(said: Said) -> bool:
        if said.kind == "end" or said.number > 1:
            said.talk.socket.close()
            return True
        return False

    with Fake(head=lose) as fake:
        run, _ = fake.open()
        with run:
            for _ in range(2):
                with pytest.raises(MuondError, match="CONNECTION_LOST"):
                    run.step(GRADIENTS)


def test_a_shard_that_was_taken_over_ends_the_step_for_all() -> None:
    waiting = threading.Event()

    def wait(said: Said) -> bool:
        if said.kind == "end":
            waiting.set()
            return True
        return False

    def taken(said: Said) -> bool:
        if said.kind == "end":
            waiting.wait(10)
            said.talk.socket.close(4409, "taken")
            return True
        return False

    with Fake(first=wait, second=taken) as fake:
        run, weights = fake.open()
        with run:
            for _ in range(2):
                with pytest.raises(MuondError, match="TAKEN_OVER"):
                    run.step(GRADIENTS)
        assert taken_once(weights)


def test_a_refused_gradient_waits_for_the_other_shards_and_no_longer() -> None:
    refused = threading.Event()

    def lose(said: Said) -> bool:
        if said.kind == "end":
            refused.wait(10)
            said.talk.socket.close()
            return True
        return False

    def refuse(said: Said) -> bool:
        if said.kind == "gradient":
            said.error("GRADIENT_NOT_FINITE", status=422, parameter=0, step=1)
            try:
                while said.talk.hear():
                    said.error("STEP_INCOMPLETE", step=1)
            finally:
                refused.set()
        return False

    with Fake(first=lose, second=refuse) as fake:
        run, weights = fake.open()
        with run, pytest.raises(MuondError) as caught:
            run.step(GRADIENTS)
        fields = caught.value.fields
        assert (caught.value.code, fields.refused, fields.parameter) == ("GRADIENT_NOT_FINITE", ("w1",), 1)
        assert np.array_equal(weights[0], -GRADIENTS[0])


def test_a_step_that_nobody_waits_for_is_not_tried_again() -> None:
    def lose(said: Said) -> bool:
        if said.kind == "end":
            run.hurry()
            said.talk.socket.close()
            return True
        return False

    with Fake(head=lose) as fake:
        run, _ = fake.open()
        with run, pytest.raises(MuondError, match="CONNECTION_LOST"):
            run.step(GRADIENTS)
        assert len(fake.opens) == 3


@pytest.mark.parametrize("who", ["head", "first"])
def test_a_run_that_is_closed_in_the_middle_of_a_step_ends_it(who: str) -> None:
    def wait(said: Said) -> bool:
        if said.kind == "end":
            run.close()
            return True
        return False

    with Fake(**{who: wait}) as fake:
        run, _ = fake.open()
        with pytest.raises(MuondError, match="CLIENT_CLOSED"):
            run.step(GRADIENTS)


def test_a_run_that_is_closed_before_another_attempt_makes_none() -> None:
    def lose(said: Said) -> bool:
        if said.kind == "end":
            said.talk.socket.close()
            return True
        return False

    def closing() -> float:
        run._writer._stop.set()  # type: ignore[attr-defined]
        return 0.0

    with Fake(head=lose) as fake:
        run, _ = fake.open(backoff=muond.Backoff(60.0, 60.0, closing))
        with run, pytest.raises(MuondError, match="the run was closed"):
            run.step(GRADIENTS)
        assert len(fake.opens) == 3


def test_a_checkpoint_is_asked_of_the_head_again_and_of_this_step() -> None:
    def lose(said: Said) -> bool:
        if said.kind == "checkpoint" and said.number == 1:
            said.talk.socket.close()
            return True
        if said.kind == "checkpoint" and said.frame.get("tag") == "wrong":
            said.talk.say(type="checkpointed", checkpoint="c", step=9, digest="d", bytes=1)
            return True
        return False

    with Fake(head=lose) as fake:
        run, _ = fake.open()
        with run:
            run.step(GRADIENTS)
            assert (run.checkpoint("t").step, run.checkpoint().id) == (1, "c")
            with pytest.raises(MuondError, match="kept step 9, this client is at 1"):
                run.checkpoint("wrong")
            run.moved(run.step_count, "imported")
            assert run.digest == "imported"
            assert run.step(GRADIENTS).step == 2


def test_slots_of_shared_memory_go_by_the_indices_of_the_whole() -> None:
    own = HostArenas([4, 8], [4, 8])
    arenas = ShardArenas(own, {3: 0, 7: 1})
    assert (arenas.kind, arenas.gradient(7) is own.gradient(1), len(arenas.gradient_bytes(3))) == ("shm", True, 4)
    own.close()
