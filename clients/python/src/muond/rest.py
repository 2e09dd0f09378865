"""The service's REST interface, as far as a trainer needs it: what a run is, and its state."""

from __future__ import annotations

import http.client
import json
import ssl
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from .error import MuondError
from .transport.address import Endpoint
from .transport.upgrade import problem_error
from .wire.safetensors import HEADER_BYTES, read_header, write_header

# A state of gigabytes is read and written by the service before it answers.
TIMEOUT_SECONDS = 600.0
_SMALL_BYTES = 1 << 26


@dataclass(frozen=True)
class Tensor:
    """A tensor as safetensors has it: ``dtype`` such as F32, ``data`` its bytes in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class Rest:
    """One HTTP connection, kept between requests; use it in a ``with``. Every method raises MuondError."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._headers = {
            **endpoint.headers,
            **({"Authorization": f"Bearer {endpoint.token}"} if endpoint.token else {}),
        }
        if endpoint.tls:
            context = endpoint.ssl_context or ssl.create_default_context()
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                endpoint.host, endpoint.port, timeout=TIMEOUT_SECONDS, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=TIMEOUT_SECONDS)

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
        self._request("DELETE", f"/v1/runs/{quote(run, safe='')}").read()

    def parameter_state(self, run: str, index: int) -> tuple[list[Tensor], dict[str, str]]:
        """The state tensors of one parameter, and what the service says of their form."""
        path = f"/v1/runs/{quote(run, safe='')}/parameters/{index}/state"
        response = self._request("GET", path)
        try:
            (length,) = struct.unpack("<Q", _exactly(response, 8).data)
            if length > HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")  # noqa: TRY301
            described, metadata = read_header(_exactly(response, length).tobytes())
            tensors = [Tensor(d.name, d.dtype, d.shape, _exactly(response, d.end - d.begin)) for d in described]
        except (ValueError, OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise MuondError("FRAME_MALFORMED", f"GET {path} sent what is no safetensors body: {error}") from error
        response.read()
        return tensors, metadata

    def import_state(self, run: str, tensors: Sequence[Tensor], metadata: dict[str, str]) -> None:
        """Replaces the whole state of a run."""
        head, length = write_header({t.name: (t.dtype, t.shape) for t in tensors}, metadata)

        def body() -> Iterator[bytes | memoryview]:
            yield head
            for tensor in tensors:
                yield tensor.data.data

        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(head) + length)}
        self._request("PUT", f"/v1/runs/{quote(run, safe='')}/state", body(), headers).read()

    def _json(self, method: str, path: str) -> dict[str, Any]:
        body = self._request(method, path).read(_SMALL_BYTES)
        answer = json.loads(body)
        if not isinstance(answer, dict):
            raise MuondError("FRAME_MALFORMED", f"{method} {path} answered with a {type(answer).__name__}")
        return answer

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
            self._connection.close()
            raise MuondError(
                "CONNECTION_LOST", f"{method} {path} at {self._endpoint.authority} failed: {error}"
            ) from error
        if response.status >= 400:
            retry_after = response.headers.get("retry-after")
            raise problem_error(response.status, response.read(1 << 16), retry_after, f"{method} {path} was refused")
        return response


def _exactly(response: http.client.HTTPResponse, count: int) -> npt.NDArray[np.uint8]:
    data = np.empty(count, np.uint8)
    view = data.data
    while len(view) > 0:
        received = response.readinto(view)
        if received == 0:
            raise ValueError(f"the body ends {len(view)} bytes early")
        view = view[received:]
    return data
