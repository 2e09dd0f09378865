"""The client's half of checkpoints, as docs/protocol.md has the frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import muond
from muond import MuondError, Parameter
from peer import ERROR, OPENED, Peer, Talk
from trainer import QUICK

KEPT = {"type": "checkpointed", "checkpoint": "c7", "step": 0, "digest": "d0", "bytes": 12}


def opened_by(peer: Peer) -> muond.Run:
    return muond.open_run(
        peer.url,
        run="r",
        parameters=[Parameter("w", "all", np.zeros(2, np.float32))],
        backoff=QUICK,
        checkpoint="first",
    )


def test_a_checkpoint_is_asked_for_between_steps_and_named() -> None:
    heard: list[dict[str, Any]] = []

    def script(talk: Talk) -> None:
        talk.opened()
        for _ in range(2):
            heard.append(talk.hear())
            talk.say(**KEPT)
        talk.until_closed()

    with Peer(script) as peer, opened_by(peer) as run:
        assert run.checkpoint("best") == muond.Checkpoint("c7", 0, "d0", 12)
        assert run.checkpoint().id == "c7"
    assert heard == [{"type": "checkpoint", "tag": "best"}, {"type": "checkpoint"}]


def test_a_lost_connection_is_opened_again_for_it() -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        if talk.number == 0:
            return talk.socket.close(1001)
        assert talk.hear()["type"] == "checkpoint"
        talk.say(**KEPT)
        return talk.until_closed()

    with Peer(script) as peer, opened_by(peer) as run:
        run._writer._connection._thread.join(10)
        assert run.checkpoint().id == "c7"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({**ERROR, "code": "FRAME_UNEXPECTED", "status": 400}, "FRAME_UNEXPECTED"),
        ({**KEPT, "step": 3}, "FRAME_UNEXPECTED"),
    ],
)
def test_a_refused_one_and_one_of_another_step_are_errors(answer: dict[str, Any], code: str) -> None:
    def script(talk: Talk) -> None:
        talk.opened()
        talk.hear()
        talk.say(**answer)
        talk.until_closed()

    with Peer(script) as peer, opened_by(peer) as run:
        with pytest.raises(MuondError) as caught:
            run.checkpoint()
        assert caught.value.code == code


def test_going_back_names_the_checkpoint_once() -> None:
    opens: list[dict[str, Any]] = []

    def script(talk: Talk) -> None:
        opens.append(talk.hear())
        talk.say(**{**OPENED, "step": 5 if talk.number == 0 else 3, "digest": f"d{talk.number}"})
        talk.until_closed()

    with Peer(script) as peer, opened_by(peer) as run:
        assert run.step_count == 5
        run.reopen("c3")
        assert (run.step_count, run.digest) == (3, "d1")
        run.reopen()
    assert [frame.get("checkpoint") for frame in opens] == ["first", "c3", None]
    assert [frame.get("takeover") for frame in opens] == [None, True, True]
