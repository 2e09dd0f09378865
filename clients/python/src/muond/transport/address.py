"""Where a service is."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ..error import MuondError

DEFAULT_URL = "ws://127.0.0.1:8787"
_SCHEMES = {"ws": False, "http": False, "wss": True, "https": True}
_UNIX = "ws+unix"


@dataclass(frozen=True)
class Endpoint:
    """A service and how to reach it."""

    host: str
    port: int
    path: str
    tls: bool
    token: str | None = field(default=None, repr=False)
    """Sent as ``Authorization: Bearer``."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    socket_path: str | None = None
    """Of a Unix socket on this machine; ``host`` and ``port`` say nothing then."""

    @property
    def authority(self) -> str:
        """What tells this service from others: ``host:port``, or the path of its socket."""
        return self.socket_path if self.socket_path is not None else self.host_header

    @property
    def host_header(self) -> str:
        """The ``Host`` of a request."""
        if self.socket_path is not None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        if self.socket_path is not None:
            return f"{_UNIX}://{self.socket_path}:{self.path}"
        return f"{'wss' if self.tls else 'ws'}://{self.authority}{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing but this machine can be on the way."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True)
class Addresses:
    """Where a service is to be found: the first of these that answers will do. All are given the same key and headers."""

    endpoints: tuple[Endpoint, ...]
    """At least one."""

    @property
    def first(self) -> Endpoint:
        return self.endpoints[0]

    @property
    def has_loopback(self) -> bool:
        return any(endpoint.is_loopback for endpoint in self.endpoints)

    def led_by(self, found: Endpoint) -> Addresses:
        """The same with ``found`` before all others."""
        return Addresses((found, *(endpoint for endpoint in self.endpoints if endpoint != found)))


def another(url: str, asked: Endpoint) -> Endpoint:
    """The address of another process of the service, as the one at ``asked`` gives it.

    Raises MuondError for one that the key must not be sent to: without TLS, where the trainer has asked for TLS.
    """
    try:
        found = endpoint(url, token=asked.token, headers=asked.headers, ssl_context=asked.ssl_context)
    except ValueError as error:
        raise MuondError("FRAME_UNEXPECTED", f"{asked.url} gives an address that is none: {error}") from error
    if asked.tls and not found.tls:
        raise MuondError(
            "FRAME_UNEXPECTED",
            f"{asked.url} gives the address {found.url}, which has no TLS: start its processes with --advertise wss://…",
        )
    return found


def addresses(
    url: str | Sequence[str] | None = None,
    *,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> Addresses:
    """Reads one address or several, each as ``endpoint`` does.

    ``url`` defaults to the environment's MUOND_URL, which may have several with commas between, then to ws://127.0.0.1:8787.
    Raises ValueError, naming what is wrong with an address, also for none.
    """
    if url is None:
        given: Sequence[str] = os.environ.get("MUOND_URL", DEFAULT_URL).split(",")
    else:
        given = [url] if isinstance(url, str) else url
    if not given:
        raise ValueError("the list of urls is empty")
    each = (endpoint(one.strip(), token=token, headers=headers, ssl_context=ssl_context) for one in given)
    return Addresses(tuple(each))


def endpoint(
    url: str,
    *,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> Endpoint:
    """Reads an address: ``ws://host:port``, ``wss://…``, or the same with http; without a path it means ``/v1/stream``.
    ``ws+unix:///run/muond.sock`` is a Unix socket, and ``ws+unix:///run/muond.sock:/path`` has a path.

    ``token`` defaults to the environment's MUOND_TOKEN. Raises ValueError, naming what is wrong with the address.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES and parts.scheme != _UNIX:
        raise ValueError(
            f"the url '{url}' has the scheme '{parts.scheme}', expected ws://, wss://, http://, https:// or {_UNIX}://"
        )
    is_unix = parts.scheme == _UNIX
    if is_unix and (parts.netloc or not parts.path.strip("/")):
        raise ValueError(f"the url '{url}' names no socket, expected {_UNIX}:///path/of.sock")
    if not is_unix and not parts.hostname:
        raise ValueError(f"the url '{url}' names no host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the url of {parts.hostname} has a user or a password in it; give the key as token=")
    for name, value in {**(headers or {}), "token": token or ""}.items():
        if any(character in f"{name}{value}" for character in "\r\n"):
            raise ValueError(f"the header '{name}' has a line break in it")
    tls = _SCHEMES.get(parts.scheme, False)
    socket_path, _, rest = parts.path.partition(":") if is_unix else (None, "", parts.path)
    path = "/v1/stream" if rest in ("", "/") else rest
    return Endpoint(
        host=parts.hostname or "localhost",
        port=parts.port if not is_unix and parts.port is not None else (443 if tls else 80),
        path=f"{path}?{parts.query}" if parts.query else path,
        tls=tls,
        token=token if token is not None else os.environ.get("MUOND_TOKEN"),
        headers=dict(headers or {}),
        ssl_context=ssl_context,
        socket_path=socket_path,
    )
