"""The first ``open`` of a run: its answer says which writer it has."""

from __future__ import annotations

from ..wire.frame import Frame
from .asking import enter
from .service_writer import ServiceWriter
from .writer import Host, Writer


def open_writer(host: Host, frame: Frame) -> Writer:
    """Opens a run. It is not retried: a wrong address, key or run should be heard of at once."""
    transport = host.sharing.transport(host.addresses, frame["parameters"])
    try:
        connection, opened = transport.agree(lambda offers: enter(host.addresses, frame, offers))
    except BaseException:
        transport.close()
        raise
    return ServiceWriter(host, frame, transport, connection, opened)
