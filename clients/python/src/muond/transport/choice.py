"""How gradients and updates travel: which memory is offered to the service, and which of it was taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..connection import Connection
from ..error import MuondError
from ..wire.frame import Frame
from .address import Addresses, Endpoint
from .arenas import Arenas, HostArenas, Sizes

TRANSPORTS = ("auto", "cuda-ipc", "shm", "websocket")

MakeArenas = Callable[[Sizes, Sizes], Arenas]
"""Makes arenas for gradients and updates of these sizes. Raises OSError where it cannot, with the reason."""

Handshake = Callable[[Callable[[Endpoint], Mapping[str, Any]]], tuple[Connection, Frame]]
"""Opens a connection; it is given what ``open`` offers to the process at an address."""


class Transport:
    """The arenas of one run: offered with every ``open``, until one of them was taken; then that one alone."""

    def __init__(self, asked: str = "websocket", arenas: Sequence[Arenas] = (), reasons: Sequence[str] = ()) -> None:
        """``reasons``: why arenas could not be made."""
        self._asked = asked
        self._arenas = list(arenas)
        self._reasons = list(reasons)
        self._told = False
        self._agreed = False
        self._unproved = False
        self.taken: Arenas | None = None
        """The memory that the newest connection shares with the service."""

    @staticmethod
    def choose(asked: str, addresses: Addresses, sizes: tuple[Sizes, Sizes], on_gpu: MakeArenas | None) -> Transport:
        """Makes the memory that ``asked`` names. Raises ValueError for a name that there is not, or where it cannot be made."""
        if asked not in TRANSPORTS:
            raise ValueError(f"transport is {asked!r}, expected one of {', '.join(map(repr, TRANSPORTS))}")
        if asked == "cuda-ipc" and on_gpu is None:
            raise ValueError("transport='cuda-ipc' needs parameters on one CUDA device")
        makers: list[MakeArenas] = []
        if addresses.has_loopback or asked != "auto":
            makers += [on_gpu] if on_gpu is not None and asked in ("auto", "cuda-ipc") else []
            makers += [HostArenas] if asked in ("auto", "shm") else []
        arenas: list[Arenas] = []
        reasons: list[str] = []
        for make in makers:
            try:
                arenas.append(make(*sizes))
            except (OSError, AttributeError) as error:
                reasons.append(str(error))
        if asked not in ("auto", "websocket") and not arenas:
            raise ValueError(f"transport={asked!r} is not possible: {'; '.join(reasons)}")
        return Transport(asked, arenas, reasons)

    def agree(self, handshake: Handshake) -> tuple[Connection, Frame]:
        """Opens a connection with what there is to offer. Raises MuondError for one that must be taken and was not.

        An answer other than ``opened`` takes nothing.
        """
        self.taken = None
        connection, opened = handshake(self._offers)
        if opened["type"] != "opened":
            return connection, opened
        answer = opened.get("transport", {})
        refused = [f"{entry.get('kind')}: {entry.get('reason')}" for entry in answer.get("refused", [])]
        taken = next((arenas for arenas in self._arenas if arenas.kind == answer.get("kind")), None)
        if taken is not None and not taken.proved():
            self._reasons.append(f"{taken.kind}: the service does not see this process's memory")
            self._unproved = True
            connection.close(MuondError("CLIENT_CLOSED", self._reasons[-1]))
            self._drop([taken])
            return self.agree(handshake)
        if taken is None:
            self._fall_back(connection, [*self._reasons, *refused], tell=bool(refused) or self._unproved)
        if not self._agreed:
            # Of a step in flight the gradients lie in what was taken first: that memory stays, whatever comes later.
            self._drop(arenas for arenas in self._arenas if arenas is not taken)
        self._agreed = True
        self.taken = taken
        return connection, opened

    def close(self) -> None:
        self._drop(self._arenas)

    def _offers(self, endpoint: Endpoint) -> Mapping[str, Any]:
        # A process on another machine refuses them all, which would be told.
        if self._asked == "auto" and not endpoint.is_loopback:
            return {}
        offers = [arenas.offer() for arenas in self._arenas]
        return {"transport": offers} if offers else {}

    def _drop(self, dropped: Iterable[Arenas]) -> None:
        for arenas in list(dropped):
            arenas.close()
            self._arenas.remove(arenas)

    def _fall_back(self, connection: Connection, reasons: Sequence[str], *, tell: bool) -> None:
        why = "; ".join(reasons) or "the service shares no memory"
        if self._asked not in ("auto", "websocket"):
            error = MuondError("REQUEST_INVALID", f"transport={self._asked!r} was not taken: {why}", status=400)
            connection.close(error)
            raise error
        if tell and not self._told:
            self._told = True
            warnings.warn(
                f"gradients and updates go over the socket, which is slower than shared memory: {why}. "
                "transport='websocket' asks for that",
                RuntimeWarning,
                stacklevel=2,
            )
