"""The real service for every test that needs one: built from this checkout, on the CPU and a free port."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from service import Proxy, Service, build

# The same examples in every run; how long one takes says something about the machine only.
hypothesis.settings.register_profile("muond", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("muond")
# A shell has its background jobs ignore Ctrl-C, and the tests of it would wait for ever there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Iterator[Service]:
    """One service for all tests that leave nothing behind but runs under names of their own."""
    build()
    service = Service("--max-runs", "4096")
    yield service
    service.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Service]]:
    """Starts services of the test's own, with settings; they end with the test."""
    build()
    services: list[Service] = []

    def begin(*flags: str, port: int = 0) -> Service:
        services.append(Service(*flags, port=port))
        return services[-1]

    yield begin
    for service in services:
        service.stop()


@pytest.fixture
def durable(start: Callable[..., Service], tmp_path: Path) -> Callable[..., Service]:
    """Starts a service that keeps its runs in the test's own folder."""
    return lambda *flags: start("--data", str(tmp_path), *flags)


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Starts proxies that cut connections; they end with the test."""
    proxies: list[Proxy] = []

    def begin(*arguments: object, **options: object) -> Proxy:
        proxies.append(Proxy(*arguments, **options))  # type: ignore[arg-type]
        return proxies[-1]

    yield begin
    for one in proxies:
        one.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A run name that no other test has."""
    text = request.node.nodeid.rsplit("::", 1)[-1]
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in text)
    return f"t{plain}"[:120]
