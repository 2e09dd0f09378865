"""What an address may be."""

from __future__ import annotations

import pytest

from muond.transport.address import Endpoint, addresses, endpoint


@pytest.mark.parametrize(
    ("text", "url", "loopback"),
    [
        ("ws://127.0.0.1:8787", "ws://127.0.0.1:8787/v1/stream", True),
        ("http://localhost:80/", "ws://localhost:80/v1/stream", True),
        ("wss://muond.example", "wss://muond.example:443/v1/stream", False),
        ("https://muond.example/proxy/stream?key=1", "wss://muond.example:443/proxy/stream?key=1", False),
        ("ws://[::1]:9", "ws://[::1]:9/v1/stream", True),
        ("ws://10.0.0.1", "ws://10.0.0.1:80/v1/stream", False),
        ("ws+unix:///run/muond.sock", "ws+unix:///run/muond.sock:/v1/stream", True),
        ("ws+unix:///run/muond.sock:/other?key=1", "ws+unix:///run/muond.sock:/other?key=1", True),
    ],
)
def test_an_address_is_completed(text: str, url: str, loopback: bool) -> None:
    found = endpoint(text)
    assert (found.url, found.is_loopback) == (url, loopback)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("127.0.0.1:8787", "has the scheme"),
        ("ftp://host", "has the scheme 'ftp'"),
        ("ws://", "names no host"),
        ("ws+unix://", "names no socket"),
        ("ws+unix://run/muond.sock", "names no socket"),
        ("ws://me:secret@host", "a user or a password"),
    ],
)
def test_a_wrong_address_is_refused_without_its_secret(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        endpoint(text)
    assert "secret" not in str(caught.value)


def test_a_unix_socket_is_known_by_its_path() -> None:
    found = endpoint("ws+unix:///run/muond.sock")
    assert (found.authority, found.host_header, found.socket_path) == (
        "/run/muond.sock",
        "localhost",
        "/run/muond.sock",
    )


def test_a_header_cannot_bring_another_one() -> None:
    with pytest.raises(ValueError, match="'token' has a line break"):
        endpoint("ws://host", token="a\r\nHost: b")
    with pytest.raises(ValueError, match="line break"):
        endpoint("ws://host", headers={"a\n": "b"})


def test_address_and_key_come_from_the_environment_where_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUOND_URL", raising=False)
    assert addresses().first.url == "ws://127.0.0.1:8787/v1/stream"
    monkeypatch.setenv("MUOND_URL", "wss://muond.example, ws://two:1")
    monkeypatch.setenv("MUOND_TOKEN", "abc")
    found = addresses()
    assert [(one.host, one.token) for one in found.endpoints] == [("muond.example", "abc"), ("two", "abc")]
    assert [one.port for one in addresses(["ws://one:1", "ws://two:2"]).endpoints] == [1, 2]
    with pytest.raises(ValueError, match="the list of urls is empty"):
        addresses([])
    assert endpoint("ws://other", token="mine") == Endpoint("other", 80, "/v1/stream", False, "mine")


def test_a_key_is_not_printed() -> None:
    assert "abc" not in repr(endpoint("ws://host", token="abc", headers={"Cookie": "abc"}))
