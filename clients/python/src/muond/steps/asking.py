"""A question to a service and its one answer, and the way to the process that has a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..connection import Connection, Listener
from ..error import MuondError
from ..transport.address import Addresses, Endpoint, another
from ..wire.frame import PROTOCOL, Frame, frame_error

# The service has this long to answer an `open` or a `checkpoint`: both may have to write or read a model's state.
ANSWER_SECONDS = 600.0
# A process that does not have the run names the one that has. More hops mean that they disagree.
_HOPS = 4
# Of several addresses the next one is tried after these: another process may do what this one cannot.
_NEXT_ADDRESS = ("CONNECTION_LOST", "DRAINING", "OVERLOADED")

T = TypeVar("T")

Offers = Callable[[Endpoint], Mapping[str, Any]]
"""What ``open`` offers to the process at an address, beside what it says to all of them."""


def no_offers(endpoint: Endpoint) -> Mapping[str, Any]:
    return {}


class Answer(Listener):
    """Waits for one frame of some types."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds
        self._done = threading.Event()
        self._answer: Frame | None = None
        self._error: BaseException | None = None

    def wait(self, question: str) -> Frame:
        if not self._done.wait(ANSWER_SECONDS):
            raise MuondError("CONNECTION_LOST", f"no answer to {question} within {ANSWER_SECONDS:.0f} s")
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    def frame(self, frame: Frame) -> None:
        if self._done.is_set():
            super().frame(frame)
        elif frame["type"] in self._kinds:
            self._answer = frame
            self._done.set()
        elif frame["type"] == "error":
            self._error = frame_error(frame)
            self._done.set()
        else:
            super().frame(frame)

    def closed(self, reason: BaseException) -> None:
        if not self._done.is_set():
            self._error = reason
            self._done.set()


def ask(connection: Connection, frame: Frame, *kinds: str) -> Frame:
    """Sends a frame and waits for its answer. On an error the connection is ended, and the error raised."""
    listener = Answer(*kinds)
    try:
        connection.listen(listener)
        connection.send(frame)
        answer = listener.wait(frame["type"])
    except BaseException as error:
        connection.fail(error)
        raise
    connection.listen()
    return answer


def enter(addresses: Addresses, frame: Frame, offers: Offers = no_offers) -> tuple[Connection, Frame]:
    """Opens a run at the first address that answers, or where that one sends this client; the answer is ``opened`` or ``placed``."""
    return at_first(addresses, lambda endpoint: _follow(endpoint, frame, offers))


def at_first(addresses: Addresses, work: Callable[[Endpoint], T]) -> T:
    """Does ``work`` at the first address that answers. Raises MuondError, the error of the last if none does."""
    *others, last = addresses.endpoints
    for endpoint in others:
        try:
            return work(endpoint)
        except MuondError as error:
            if error.code not in _NEXT_ADDRESS:
                raise
    return work(last)


def _follow(endpoint: Endpoint, frame: Frame, offers: Offers) -> tuple[Connection, Frame]:
    for _ in range(_HOPS):
        connection = Connection(endpoint)
        answer = ask(connection, {**frame, **offers(endpoint)}, "opened", "placed", "moved")
        if answer["type"] != "moved":
            return connection, answer
        connection.close(MuondError("CLIENT_CLOSED", "the run is opened where it is"))
        endpoint = another(answer["url"], endpoint)
    message = f"run '{frame['run']}' was said to be elsewhere {_HOPS} times, last at {endpoint.url}"
    raise MuondError("CONNECTION_LOST", f"{message}: do all processes have the same --peers?")


def moved_to(endpoint: Endpoint, run: str) -> Endpoint:
    """The process that may have a run which the one at ``endpoint`` does not have. Nothing is opened.

    Raises MuondError, RUN_NOT_FOUND where that one would have it.
    """
    connection = Connection(endpoint)
    frame = {"type": "open", "protocol": PROTOCOL, "run": run, "mode": "resume", "shards": 0}
    answer = ask(connection, frame, "moved")
    connection.close(MuondError("CLIENT_CLOSED", "the run was only looked for"))
    return another(answer["url"], endpoint)


def lost_state(error: MuondError, known_step: int) -> MuondError:
    """RUN_NOT_FOUND, for a run that this client has left at a step."""
    message = f"{error.message}; it was at step {known_step} here: was the service restarted without durable state?"
    return MuondError(error.code, message, error.fields, status=error.status, retryable=False)
