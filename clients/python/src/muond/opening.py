"""The first ``open`` of a run: its answer says who computes it."""

from __future__ import annotations

from .steps.service_writer import ServiceWriter, enter_shared
from .steps.writer import Host, Writer
from .whole.writer import WholeWriter
from .wire.frame import Frame


def open_writer(host: Host, frame: Frame) -> Writer:
    """Opens a run, in one process of the service or in several. A wrong address, key or run is heard of at once."""
    transport, connection, answer = enter_shared(host, frame)
    if answer["type"] == "opened":
        return ServiceWriter(host, frame, transport, connection, answer)
    # Each shard has memory of its own.
    transport.close()
    return WholeWriter(host, frame, connection, answer)
