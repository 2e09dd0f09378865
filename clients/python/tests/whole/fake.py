"""A head and two shards that do what a test tells them; each shard has one parameter of two elements."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

import muond
from muond import Parameter
from peer import OPENED, RECEIPT, UPDATE, Peer, Talk
from trainer import QUICK

Act = Callable[["Said"], None]
PLACED: dict[str, Any] = {
    "type": "placed",
    "run": "r",
    "generation": 1,
    "step": 0,
    "resumed": True,
    "digest": "d0",
    "limits": {"chunk_bytes": 1 << 22},
    "server": {"name": "peer", "version": "0", "device": "none"},
}


class Said:
    """A frame of the client, and the connection that it came on: the ``number``-th of its run."""

    def __init__(self, talk: Talk, number: int, frame: dict[str, Any]) -> None:
        self.talk = talk
        self.number = number
        self.frame = frame
        self.kind: str = frame["type"]

    def error(self, code: str, **more: Any) -> None:
        self.talk.say(
            **{"type": "error", "code": code, "message": "told to", "status": 409, "retryable": False, **more}
        )


class Fake:
    """``acts[run]`` is asked for each frame; where there is none, or it returns False, the usual is done."""

    def __init__(self, **acts: Callable[[Said], bool | None]) -> None:
        self.acts = {"r": acts.get("head"), "r~0": acts.get("first"), "r~1": acts.get("second")}
        self.opens: list[dict[str, Any]] = []
        self.ends: Counter[str] = Counter()
        self.step = 0
        self.placed: dict[str, Any] = {}
        """What is said otherwise than in PLACED."""
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.peer = Peer(self._script)

    @property
    def url(self) -> str:
        return self.peer.url

    def shards(self) -> list[dict[str, Any]]:
        return [{"run": f"r~{i}", "url": self.url, "parameters": [[i, i + 1]]} for i in range(2)]

    def open(self, **options: Any) -> tuple[muond.Run, list[npt.NDArray[np.float32]]]:
        weights = [np.zeros(2, np.float32) for _ in range(2)]
        parameters = [Parameter(f"w{i}", "all", array) for i, array in enumerate(weights)]
        given = {"transport": "websocket", "backoff": QUICK, "retries": 3, **options}
        return muond.open_run(self.url, run="r", parameters=parameters, **given), weights

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.peer.close()

    def _script(self, talk: Talk) -> None:
        frame = talk.hear()
        run: str = frame["run"]
        with self._lock:
            self.opens.append(frame)
            self._numbers[run] += 1
            number = self._numbers[run]
        while True:
            said = Said(talk, number, frame)
            act = self.acts[run]
            if act is None or act(said) is False:
                (self._head if run == "r" else self._shard)(said, run)
            frame = talk.hear()

    def _head(self, said: Said, run: str) -> None:
        if said.kind == "open":
            said.talk.say(
                **{**PLACED, "step": self.step, "digest": f"d{self.step}", "shards": self.shards(), **self.placed}
            )
        elif said.kind == "end":
            self.step = said.frame["step"]
            said.talk.say(**{**RECEIPT, "step": self.step, "digest": f"d{self.step}", "applied": 2})
        elif said.kind == "checkpoint":
            said.talk.say(type="checkpointed", checkpoint="c", step=self.step, digest=f"d{self.step}", bytes=8)

    def _shard(self, said: Said, run: str) -> None:
        step = said.frame.get("step", self.step)
        if said.kind == "open":
            said.talk.say(**{**OPENED, "run": run, "step": step, "digest": f"{run} {step}"})
        elif said.kind == "gradient":
            said.talk.say(**{**UPDATE, "step": step, "replayed": False, "data": said.frame["data"]})
        elif said.kind == "end":
            self.ends[run] += 1
            said.talk.say(**{**RECEIPT, "step": step, "digest": f"{run} {step}"})


GRADIENTS = [np.array([1, 2], np.float32), np.array([3, 4], np.float32)]
