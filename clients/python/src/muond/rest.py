"""The service's REST interface, as far as a trainer needs it: what a run is, and its state."""

from __future__ import annotations

import http.client
import io
import json
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from .error import MuondError
from .steps.attempts import Attempts
from .steps.backoff import Backoff
from .transport.address import Endpoint
from .transport.upgrade import connect_unix, problem_error
from .wire.safetensors import HEADER_BYTES, Described, read_header, write_header

# A state of gigabytes is read and written by the service before it answers.
TIMEOUT_SECONDS = 600.0
# How long a request waits on which nobody depends.
HURRIED_SECONDS = 5.0
_SMALL_BYTES = 1 << 26
_TOGETHER_BYTES = 1 << 20
# The bytes of the widest element.
_ALIGNMENT = 8

T = TypeVar("T")


class Tensor(NamedTuple):
    """A tensor as safetensors has it: ``dtype`` such as F32, ``data`` its bytes in C order, at an address that suits any dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


Take = Callable[[Tensor], None]
"""What becomes of a tensor that was read."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._seconds = timeout

    def connect(self) -> None:
        self.sock = connect_unix(self._path, self._seconds)


class Rest:
    """One HTTP connection, kept between requests; use it in a ``with``. Every method raises MuondError.

    A request that failed is made again as long as that is worth it, ``retries`` times: a service that restarts answers
    RESTORING until it has the run.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        retries: int = 0,
        backoff: Backoff | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._endpoint = endpoint
        self._retries = retries
        self._backoff = backoff or Backoff()
        self._seconds = timeout_seconds
        self._headers = {
            **endpoint.headers,
            **({"Authorization": f"Bearer {endpoint.token}"} if endpoint.token else {}),
        }
        if endpoint.socket_path is not None:
            self._connection: http.client.HTTPConnection = _UnixConnection(endpoint.socket_path, timeout_seconds)
        elif endpoint.tls:
            context = endpoint.ssl_context or ssl.create_default_context()
            self._connection = http.client.HTTPSConnection(
                endpoint.host, endpoint.port, timeout=timeout_seconds, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=timeout_seconds)

    def __enter__(self) -> Rest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()

    def capabilities(self) -> dict[str, Any]:
        """What the service can do: algorithms with their hyperparameters, presets, limits."""
        return self._json("GET", "/v1/capabilities")

    def run(self, run: str) -> dict[str, Any]:
        """A run: its step, digest and hyperparameters."""
        return self._json("GET", f"/v1/runs/{quote(run, safe='')}")

    def delete(self, run: str) -> None:
        """Deletes a run and its state."""
        self._again(lambda: self._request("DELETE", f"/v1/runs/{quote(run, safe='')}").read())

    def has_checkpoints(self, run: str, *, tagged: bool = False) -> bool:
        """Whether the service keeps anything of a run on a disk; ``tagged``: anything that somebody has given a name."""
        found = self._json("GET", f"/v1/runs/{quote(run, safe='')}/checkpoints")["checkpoints"]
        return any(checkpoint["tags"] or not tagged for checkpoint in found)

    def checkpoint(self, run: str, checkpoint: str) -> dict[str, Any]:
        """A checkpoint by its id or tag: its step and digest."""
        return self._json("GET", f"/v1/runs/{quote(run, safe='')}/checkpoints/{quote(checkpoint, safe='')}")

    def state(self, run: str) -> tuple[list[Tensor], dict[str, str]]:
        """Every state tensor of a run, the counts first, as ``state.<parameter>.<name>``; and of which step and digest they are."""
        tensors: list[Tensor] = []

        def begin() -> Take:
            tensors.clear()
            return tensors.append

        return tensors, self.read_state(run, begin)

    def read_state(self, run: str, begin: Callable[[], Take]) -> dict[str, str]:
        """As ``state``, for who takes each tensor while the next ones are on their way; ``begin`` gives whom. It is called again,
        and all tensors come again, where an answer was cut off."""
        path = f"/v1/runs/{quote(run, safe='')}/state"
        return self._again(lambda: self._safetensors(path, begin()))

    def counts(self, run: str) -> list[Tensor]:
        """How many updates each parameter has had: the beginning of what ``state`` reads, and nothing behind it."""
        path = f"/v1/runs/{quote(run, safe='')}/state"

        def read() -> list[Tensor]:
            counts: list[Tensor] = []
            self._safetensors(path, counts.append, lambda name: name.endswith(".step"))
            return counts

        return self._again(read)

    def import_state(
        self, run: str, tensors: Sequence[Tensor], metadata: dict[str, str], *, partial: bool = False
    ) -> dict[str, Any]:
        """Replaces the state of a run, or with ``partial`` that of the parameters given; returns ``step`` and ``digest``."""
        head, length = write_header({t.name: (t.dtype, t.shape) for t in tensors}, metadata)

        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(head) + length)}
        path = f"/v1/runs/{quote(run, safe='')}/state{'?partial=true' if partial else ''}"
        return self._json("PUT", path, lambda: _pieces(head, tensors), headers)

    def _json(
        self,
        method: str,
        path: str,
        body: Callable[[], Iterator[bytes | memoryview]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        text = self._again(lambda: _whole(self._request(method, path, body() if body else None, headers)))
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise MuondError("FRAME_MALFORMED", f"{method} {path} sent what is no JSON: {error}") from error
        if not isinstance(answer, dict):
            raise MuondError("FRAME_MALFORMED", f"{method} {path} answered with a {type(answer).__name__}")
        return answer

    def _safetensors(self, path: str, take: Take, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, str]:
        """Reads the tensors up to the first whose name is not ``wanted``; returns the metadata."""
        response = self._request("GET", path)
        # Small tensors are read together: a system call for each takes longer than its bytes.
        body = io.BufferedReader(response, _TOGETHER_BYTES)
        try:
            (length,) = struct.unpack("<Q", _exactly(body, 8, response).data)
            if length > HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")  # noqa: TRY301
            described, metadata = read_header(_exactly(body, length, response).tobytes())
            first = list(takewhile(lambda tensor: wanted(tensor.name), described))
            for some in _together(first):
                for tensor in _read(body, some, response):
                    take(tensor)
        except ValueError as error:
            raise MuondError("FRAME_MALFORMED", f"GET {path} sent what is no safetensors body: {error}") from error
        if len(first) == len(described):
            response.read()
        else:
            # The service stops where nobody reads on.
            self._connection.close()
        return metadata

    def _again(self, request: Callable[[], T]) -> T:
        attempts = Attempts(self._retries, self._backoff)
        while True:
            try:
                return request()
            except (OSError, http.client.HTTPException) as error:
                failure = MuondError("CONNECTION_LOST", f"an answer of {self._endpoint.authority} was cut off: {error}")
                failure.__cause__ = error
            except MuondError as error:
                failure = error
            # What is left of an answer must not be taken for the beginning of the next.
            self._connection.close()
            wait = attempts.wait_after(failure)
            if wait is None:
                raise failure
            time.sleep(wait)

    def _request(
        self,
        method: str,
        path: str,
        body: Iterator[bytes | memoryview] | None = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        try:
            self._connection.request(method, path, body, {**self._headers, **(headers or {})})
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise MuondError(
                "CONNECTION_LOST", f"{method} {path} at {self._endpoint.authority} failed: {error}"
            ) from error
        if response.status >= 400:
            retry_after = response.headers.get("retry-after")
            raise problem_error(response.status, response.read(1 << 16), retry_after, f"{method} {path} was refused")
        return response


def _whole(response: http.client.HTTPResponse) -> bytes:
    body = response.read(_SMALL_BYTES)
    if response.length:
        raise ConnectionError(f"the body ends {response.length} bytes early, or has more than {_SMALL_BYTES}")
    return body


def _pieces(head: bytes, tensors: Sequence[Tensor]) -> Iterator[bytes | memoryview]:
    """A body in pieces: small tensors go together, for the same reason."""
    waiting = bytearray(head)
    for tensor in tensors:
        if len(tensor.data) < _TOGETHER_BYTES:
            waiting += tensor.data.data
            if len(waiting) < _TOGETHER_BYTES:
                continue
            yield bytes(waiting)
        else:
            yield bytes(waiting)
            yield tensor.data.data
        waiting.clear()
    yield bytes(waiting)


def _together(described: Sequence[Described]) -> Iterator[list[Described]]:
    """Tensors that follow each other, some _TOGETHER_BYTES of them: a call for each takes longer than its bytes."""
    some: list[Described] = []
    for tensor in described:
        if some and tensor.end - some[0].begin > _TOGETHER_BYTES:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


def _read(
    body: io.BufferedReader[http.client.HTTPResponse], some: Sequence[Described], response: http.client.HTTPResponse
) -> Iterator[Tensor]:
    """Tensors that follow each other, each a part of one buffer, or a copy where its elements would not be aligned in it."""
    start = some[0].begin
    data = _exactly(body, some[-1].end - start, response)
    for name, dtype, shape, begin, end in some:
        part = data[begin - start : end - start]
        yield Tensor(name, dtype, shape, part.copy() if (begin - start) % _ALIGNMENT else part)


def _exactly(
    body: io.BufferedReader[http.client.HTTPResponse], count: int, response: http.client.HTTPResponse
) -> npt.NDArray[np.uint8]:
    data = np.empty(count, np.uint8)
    view = data.data
    while len(view) > 0:
        received = body.readinto(view)
        if received == 0:
            missing = f"the body ends {len(view)} bytes early"
            # Less than the answer's own length came: it was cut off, which is not the service's word.
            raise ConnectionError(missing) if response.length else ValueError(missing)
        view = view[received:]
    return data
