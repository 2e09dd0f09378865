"""Updates as they arrive: each one complete, once, and in memory that is used again."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..error import ErrorFields, MuondError, malformed
from ..transport.arenas import Arenas
from ..wire.frame import Frame
from .parameter import Bound

Bytes = npt.NDArray[np.uint8]


class Memory:
    """Buffers by size. Memory touched for the first time is the dearest there is, so none is given up before the run is."""

    def __init__(self, allocate: Callable[[int], Bytes] = lambda size: np.empty(size, np.uint8)) -> None:
        self._allocate = allocate
        self._free: defaultdict[int, list[Bytes]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, size: int) -> Bytes:
        with self._lock:
            free = self._free[size]
            if free:
                return free.pop()
        return self._allocate(size)

    def give(self, buffer: Bytes | None) -> None:
        """Takes a buffer back; None, of an update without data, is no buffer."""
        if buffer is not None:
            with self._lock:
                self._free[len(buffer)].append(buffer)


@dataclass
class Update:
    """A complete update: ``W <- row_scale ⊙ ((1 - decay) · W + scale · data)``."""

    parameter: Bound
    scale: float
    decay: float
    data: Any
    """The bytes as the service sent them, ``update_dtype`` in C order: a numpy array of uint8, or a tensor of uint8 where they lie
    in shared memory of a GPU. None: only the rows change."""
    row_scale: npt.NDArray[np.float32] | None
    """One factor for each of equally many consecutive elements of the whole tensor; None when all are 1."""
    shared: bool = False
    """Whether ``data`` is a slot of shared memory, which is this client's until it sends the parameter's next gradient."""


class Updates:
    """Delivers each parameter's update of the step in progress once, however often the service sends it.

    A parameter is remembered until the step is over, past any number of connections. The connection's receiving thread calls
    ``destination``, ``placed`` and ``take``; between connections and between steps nobody does.
    """

    def __init__(
        self, parameters: Sequence[Bound], step: int, memory: Memory, deliver: Callable[[Update], None]
    ) -> None:
        self._parameters = parameters
        self._step = step
        self._memory = memory
        self._deliver = deliver
        self._incoming: dict[int, tuple[Update, int]] = {}
        self._delivered: set[int] = set()

    @property
    def delivered(self) -> int:
        """How many parameters have their update of the step in progress."""
        return len(self._delivered)

    def has(self, parameter: int) -> bool:
        return parameter in self._delivered

    def name(self, parameter: int) -> str:
        return self._parameters[parameter].name

    def gradient_offset(self, parameter: int) -> Callable[[int], int]:
        """Where the byte at a position of a gradient lies in the whole tensor."""
        return self._parameters[parameter].gradient_offset

    def next(self, step: int) -> None:
        """``step`` is in progress now: updates of those before never count again."""
        self._step = step
        self._delivered.clear()
        self.forget()

    def forget(self) -> None:
        """The connection is gone: what it began to send begins again on the next."""
        for update, _ in self._incoming.values():
            self._memory.give(update.data)
        self._incoming.clear()

    def destination(self, frame: Frame, length: int) -> memoryview:
        """Where ``length`` bytes of this update go. Raises MuondError for what no service sends; nothing was delivered."""
        bound = self._bound(frame)
        offset = frame["offset"]
        if offset == bound.update_offset(0):
            self._begin(frame, bound)
        update, received = self._incoming.get(bound.index, (None, 0))
        expected = bound.update_offset(received)
        if update is None or update.data is None or offset != expected:
            raise _unexpected(frame, f"offset {offset}, expected {expected}")
        if length == 0 or received + length > len(update.data):
            raise _unexpected(frame, f"{length} bytes at offset {offset}, it has {len(update.data)} in all")
        whole: memoryview = update.data.data
        return whole[received : received + length]

    def placed(self, frame: Frame, length: int) -> int | None:
        """The bytes of the last ``destination`` are there. The parameter's index if they were the last of its update."""
        index = frame["parameter"]
        update, received = self._incoming[index]
        self._incoming[index] = (update, received + length)
        return self._finish(index) if received + length == len(update.data) else None

    def take(self, frame: Frame) -> int | None:
        """A frame that was not received in place: without data, or with a copy of it. Returns what ``placed`` does."""
        data = frame.get("data")
        if data is not None:
            self.destination(frame, len(data))[:] = data
            return self.placed(frame, len(data))
        bound = self._bound(frame)
        if frame["offset"] != 0 or bound.index in self._incoming:
            raise _unexpected(frame, f"offset {frame['offset']} and no data")
        self._begin(frame, bound, has_data=False)
        return self._finish(bound.index)

    def take_shared(self, frame: Frame, arenas: Arenas) -> list[int]:
        """Updates that lie in shared memory. Returns the parameters' indices."""
        columns = [frame[key] for key in ("parameters", "scale", "decay")]
        kinds = (int, float, float)
        fits = all(type(value) is kind for column, kind in zip(columns, kinds, strict=True) for value in column)
        if not fits or len({len(column) for column in columns}) != 1:
            raise malformed("the service sent updates whose lists are not of equally many integers and floats")
        rows = frame.get("row_scale", {})
        indices: list[int] = []
        for index, scale, decay in zip(*columns, strict=True):
            about = {"parameter": index, "step": frame["step"], "row_scale": rows.get(str(index))}
            bound = self._bound(about)
            factors = None if about["row_scale"] is None else _rows(about, bound)
            if index not in self._delivered:
                self._delivered.add(index)
                self._deliver(Update(bound, scale, decay, arenas.update(index), factors, shared=True))
            indices.append(index)
        return indices

    def _bound(self, frame: Frame) -> Bound:
        index, step = frame["parameter"], frame["step"]
        if index >= len(self._parameters):
            raise MuondError("PARAMETER_UNKNOWN", f"update of parameter {index}, the run has {len(self._parameters)}")
        if step != self._step:
            raise _unexpected(frame, f"step {step}, expected {self._step}")
        return self._parameters[index]

    def _begin(self, frame: Frame, bound: Bound, *, has_data: bool = True) -> None:
        if bound.index in self._incoming:
            raise _unexpected(frame, "offset 0 again")
        if "scale" not in frame or "decay" not in frame:
            raise _unexpected(frame, "no scale or decay")
        rows = _rows(frame, bound) if "row_scale" in frame else None
        data = self._memory.take(bound.update_bytes) if has_data else None
        self._incoming[bound.index] = (Update(bound, frame["scale"], frame["decay"], data, rows), 0)

    def _finish(self, index: int) -> int:
        update, _ = self._incoming.pop(index)
        if index in self._delivered:
            self._memory.give(update.data)
        else:
            self._delivered.add(index)
            self._deliver(update)
        return index


def _rows(frame: Frame, bound: Bound) -> npt.NDArray[np.float32]:
    data: bytes = frame["row_scale"]
    count = len(data) / 4
    if count == 0 or bound.whole % count != 0:
        raise _unexpected(frame, f"{len(data)} bytes of row scales for {bound.whole} elements")
    return np.frombuffer(data, "<f4")


def _unexpected(frame: Frame, what: str) -> MuondError:
    index = frame["parameter"]
    return MuondError("FRAME_UNEXPECTED", f"update of parameter {index} with {what}", ErrorFields(parameter=index))
