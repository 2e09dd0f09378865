"""The control connection of a whole: where its shards are, when a step of all of them is done, and checkpoints of it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..connection import Connection, Listener
from ..error import MuondError
from ..steps.again import resuming
from ..steps.asking import ask, enter, lost_state
from ..transport.address import Addresses, Endpoint
from ..wire.frame import Frame, frame_error

Told = Callable[[Frame | BaseException], None]


class Head:
    """One connection after the other, to whichever process commits the steps of the whole."""

    def __init__(self, addresses: Addresses, frame: Frame, connection: Connection) -> None:
        """``connection`` was answered ``placed`` to the ``frame``."""
        self.addresses = addresses.led_by(connection.endpoint)
        self._frame = frame
        self._connection = connection
        self._lock = threading.Lock()
        self._closed = False

    @property
    def endpoint(self) -> Endpoint:
        return self.addresses.first

    @property
    def is_lost(self) -> bool:
        return self._connection.reason is not None

    def ask_again(self, known_step: int, checkpoint: str | None = None) -> Frame:
        """Opens the whole again, or at a checkpoint, where it is now; returns its ``placed``. Raises MuondError."""
        self._connection.close(MuondError("CLIENT_CLOSED", "the run is opened again"))
        frame: Frame = {**resuming(self._frame), **({} if checkpoint is None else {"checkpoint": checkpoint})}
        try:
            connection, placed = enter(self.addresses, frame)
        except MuondError as error:
            if error.code != "RUN_NOT_FOUND":
                raise
            raise lost_state(error, known_step) from error
        with self._lock:
            self._connection = connection
            closed = self._closed
        if closed:  # pragma: no cover - the run is closed while its head is asked
            self.close()
        if placed["type"] != "placed":
            is_now = f"run '{placed['run']}' is that of one process now, it was opened with several shards"
            remade = MuondError("RUN_MISMATCH", f"{is_now}: was it made anew?")
            connection.close(remade)
            raise remade
        self.addresses = self.addresses.led_by(connection.endpoint)
        return placed

    def end(self, step: int, told: Told) -> None:
        """Asks for the receipt of a step. ``told`` is called with it, or with why there is none, by another thread.

        Raises MuondError for a connection that is over already.
        """
        self._connection.listen(_Ending(told))
        self._connection.send({"type": "end", "step": step})

    def checkpoint(self, tag: str | None) -> Frame:
        """Has every shard keep its state; returns the ``checkpointed`` of the whole."""
        return ask(self._connection, {"type": "checkpoint", **({} if tag is None else {"tag": tag})}, "checkpointed")

    def rest(self) -> None:
        """Nothing is expected any more until the next question."""
        self._connection.listen()

    def fail(self, error: BaseException) -> None:
        """Ends the connection at once."""
        self._connection.fail(error)

    def release(self) -> None:
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was released"))

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._connection.close(MuondError("CLIENT_CLOSED", "the run was closed"))


class _Ending(Listener):
    def __init__(self, told: Told) -> None:
        self._told = told

    def frame(self, frame: Frame) -> None:
        if frame["type"] == "receipt":
            self._told(frame)
        elif frame["type"] == "error":
            self._told(frame_error(frame))
        elif frame["type"] != "draining":
            super().frame(frame)

    def closed(self, reason: BaseException) -> None:
        self._told(reason)
