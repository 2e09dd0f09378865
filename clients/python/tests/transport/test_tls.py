"""The same over TLS: a proxy with a certificate of its own in front of the real service."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.sync.client import connect

import muond
from muond.connection import Connection
from muond.rest import Rest
from muond.transport.address import endpoint
from peer import Peer, Talk
from service import Service


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1 that nobody signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "muond test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture
def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@pytest.fixture
def wss(shared: Service, certificate: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def script(talk: Talk) -> None:
        with connect(f"{shared.url}/v1/stream", compression=None, max_size=None, ping_interval=None) as inner:

            def back() -> None:
                with suppress(Exception):
                    for message in inner:
                        talk.socket.send(message)

            thread = threading.Thread(target=back)
            thread.start()
            for message in talk.socket:
                inner.send(message)
        thread.join()

    with Peer(script, ssl=context) as peer:
        yield peer.url


def test_a_run_trains_over_tls_in_both_directions_at_once(wss: str, trusting: ssl.SSLContext, name: str) -> None:
    generator = np.random.default_rng(1)
    weights = [np.zeros((700, 1000), np.float32) for _ in range(6)]
    gradients = [generator.standard_normal((700, 1000), np.float32) for _ in weights]
    run = muond.open_run(
        wss,
        transport="websocket",
        run=name,
        ssl_context=trusting,
        chunk_bytes=100_000,
        groups=[{"name": "all", "algorithm": "sgd", "lr": 0.5}],
        parameters=[muond.Parameter(f"p{i}", "all", array) for i, array in enumerate(weights)],
    )
    with run:
        for _ in range(3):
            run.step(gradients)
    for array, gradient in zip(weights, gradients, strict=True):
        np.testing.assert_allclose(array, -1.5 * gradient, rtol=1e-6)


def test_a_certificate_that_nobody_signed_is_refused_at_once(wss: str) -> None:
    with pytest.raises(muond.MuondError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        Connection(endpoint(wss))
    assert (caught.value.code, caught.value.retryable) == ("CONNECTION_LOST", False)
    with pytest.raises(muond.MuondError, match="CERTIFICATE_VERIFY_FAILED"), Rest(endpoint(wss)) as rest:
        rest.capabilities()
