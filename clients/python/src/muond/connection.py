"""One connection to a service: whole frames in both directions, and one reason when it is over."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from .error import MuondError
from .transport.address import Endpoint
from .transport.receiver import Closed, Receiver
from .transport.sender import Message, Sender
from .transport.upgrade import dial
from .wire.frame import Frame, MemberKey, frame_error, is_known, members_of
from .wire.msgpack import encode, encode_head

# Close codes that say more than that the connection is gone; the others are met with a new connection.
_CLOSE_CODES = {
    1002: "FRAME_MALFORMED",
    1003: "FRAME_MALFORMED",
    1009: "FRAME_TOO_LARGE",
    1011: "INTERNAL",
    4409: "TAKEN_OVER",
}
# How long a connection that is closed in order waits for a message on its way out, and then for the service's answer.
_CLOSE_SECONDS = 2.0


class Listener:
    """Who hears what a connection receives. Outside a step the service has only bad news: an error ends the connection.

    Every method is called by the connection's receiving thread; what it raises ends the connection with that error.
    """

    def frame(self, frame: Frame) -> None:
        """A frame, but for the data of an update."""
        if frame["type"] == "error":
            raise frame_error(frame)
        if frame["type"] != "draining":
            raise MuondError("FRAME_UNEXPECTED", f"the service sent {frame['type']} outside a step")

    def destination(self, frame: Frame, length: int) -> memoryview | None:
        """Memory for the data of a frame, or None for a frame that ``frame`` refuses."""
        return None

    def placed(self, frame: Frame) -> None:
        """The memory that ``destination`` gave for this frame is full."""

    def closed(self, reason: BaseException) -> None:
        """The connection is over, whoever ended it. Called once, also if it was over before the listener came."""


class Connection:
    """A WebSocket of its own, with a thread that receives. Only one thread sends."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Raises MuondError: why the service refused, or CONNECTION_LOST."""
        self.endpoint = endpoint
        upgraded = dial(endpoint)
        self._socket = upgraded.socket
        # Masking protects proxies on the way; there are none on loopback.
        self._sender = Sender(self._socket, masked=not endpoint.is_loopback)
        self._receiver = Receiver(self._socket, upgraded.rest, destination=self._destination, ping=self._pong)
        self._lock = threading.Lock()
        self._listener = Listener()
        self.members: dict[MemberKey, bool] = {}
        """What the service has told of the run's members: whether each has a connection."""
        self._reason: BaseException | None = None
        self._ended = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._receive, name="muond receiver", daemon=True)
        self._thread.start()

    @property
    def reason(self) -> BaseException | None:
        """Why the connection is over; None while it is not."""
        return self._reason

    def listen(self, listener: Listener | None = None) -> None:
        """Frames go to this listener from now on; without one, whoever listened is let go."""
        with self._lock:
            self._listener = listener or Listener()
            ended = self._ended
        if ended and listener is not None:
            listener.closed(self._ended_because())

    def send(self, frame: Mapping[str, Any]) -> None:
        """Sends a frame; raises the reason once the connection is over."""
        self._send([(encode(frame), memoryview(b""))])

    def send_data(self, frames: Sequence[tuple[Mapping[str, Any], memoryview]]) -> None:
        """As ``send``, for frames whose last key is ``data``: bytes sent from where they lie, many frames in few system calls."""
        self._send([(encode_head(frame, len(data)), data) for frame, data in frames])

    def fail(self, reason: BaseException) -> None:
        """Ends the connection at once, for this reason unless it already has one, and waits until nothing is received any more.

        Not for the connection's own thread, which raises.
        """
        self._because(reason)
        if self._forked:  # pragma: no cover - in a forked child, which is not measured
            return
        self._shut()
        self._thread.join()

    def close(self, reason: BaseException) -> None:
        """Ends the connection with a close frame, after what was already sent."""
        self._because(reason)
        if not self._forked and self._sender.close(1000, _CLOSE_SECONDS):
            self._thread.join(_CLOSE_SECONDS)
        self.fail(reason)

    @property
    def _forked(self) -> bool:
        """A forked child has the same socket and none of the threads: what it said or shut would end its parent's connection."""
        return os.getpid() != self._process

    def _send(self, messages: Sequence[Message]) -> None:
        if self._reason is not None:
            raise self._reason
        try:
            self._sender.messages(messages)
        except OSError as error:
            # The receiving thread may be about to read why: an error frame, then the close.
            self._thread.join(_CLOSE_SECONDS)
            self._because(_lost(error))
            self._shut()
            raise self._ended_because() from error

    def _receive(self) -> None:
        try:
            self._listen_until_closed()
        except OSError as error:
            self._because(_lost(error))
        except BaseException as error:  # noqa: BLE001 - whatever a listener raises is the reason of the end, and told as that
            self._because(error)
        self._shut()
        self._socket.close()
        with self._lock:
            self._ended = True
            listener = self._listener
        listener.closed(self._ended_because())

    def _listen_until_closed(self) -> None:
        while True:
            received = self._receiver.next()
            if isinstance(received, Closed):
                self._because(_close_error(received))
                self._sender.close(1000, 0)
                return
            if self._reason is not None or not is_known(received.frame):
                continue
            listener = self._listener
            if received.frame["type"] == "members":
                self.members.update(members_of(received.frame))
            elif received.placed:
                listener.placed(received.frame)
            else:
                listener.frame(received.frame)

    def _destination(self, frame: Frame, length: int) -> memoryview | None:
        return None if self._reason is not None else self._listener.destination(frame, length)

    def _pong(self, data: bytes) -> None:
        self._sender.pong(data)

    def _because(self, reason: BaseException) -> None:
        # The first reason is the true one: what follows is its consequence.
        with self._lock:
            if self._reason is None:
                self._reason = reason

    def _ended_because(self) -> BaseException:
        assert self._reason is not None, "every end has a reason"
        return self._reason

    def _shut(self) -> None:
        # Wakes a thread that is inside a send or receive; it fails where the socket is closed already.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def _close_error(closed: Closed) -> MuondError:
    if closed.code == 1006:
        return MuondError("CONNECTION_LOST", "the connection ended without a word")
    why = f"the service closed the connection with code {closed.code}" + (f": {closed.reason}" if closed.reason else "")
    return MuondError(_CLOSE_CODES.get(closed.code, "CONNECTION_LOST"), why)


def _lost(error: OSError) -> MuondError:
    return MuondError("CONNECTION_LOST", f"the connection was lost: {error}")
