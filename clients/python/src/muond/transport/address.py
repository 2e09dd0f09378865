"""Where a service is."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

DEFAULT_URL = "ws://127.0.0.1:8787"
_SCHEMES = {"ws": False, "http": False, "wss": True, "https": True}


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

    @property
    def authority(self) -> str:
        """``host:port`` as a header and an error message have it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self.authority}{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing but this machine can be on the way."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def endpoint(
    url: str | None = None,
    *,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> Endpoint:
    """Reads an address: ``ws://host:port``, ``wss://…``, or the same with http; without a path it means ``/v1/stream``.

    ``url`` defaults to the environment's MUOND_URL, then to ws://127.0.0.1:8787; ``token`` to MUOND_TOKEN.
    Raises ValueError, naming what is wrong with the address.
    """
    text = url if url is not None else os.environ.get("MUOND_URL", DEFAULT_URL)
    parts = urlsplit(text)
    if parts.scheme not in _SCHEMES:
        raise ValueError(
            f"the url '{text}' has the scheme '{parts.scheme}', expected ws://, wss://, http:// or https://"
        )
    if not parts.hostname:
        raise ValueError(f"the url '{text}' names no host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"the url of {parts.hostname} has a user or a password in it; give the key as token=")
    for name, value in {**(headers or {}), "token": token or ""}.items():
        if any(character in f"{name}{value}" for character in "\r\n"):
            raise ValueError(f"the header '{name}' has a line break in it")
    tls = _SCHEMES[parts.scheme]
    path = "/v1/stream" if parts.path in ("", "/") else parts.path
    return Endpoint(
        host=parts.hostname,
        port=parts.port if parts.port is not None else (443 if tls else 80),
        path=f"{path}?{parts.query}" if parts.query else path,
        tls=tls,
        token=token if token is not None else os.environ.get("MUOND_TOKEN"),
        headers=dict(headers or {}),
        ssl_context=ssl_context,
    )
