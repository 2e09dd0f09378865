"""Ctrl-C in the middle of a step: weights and state must not part."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_later(noticed: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C waits for the end of this block; ``noticed`` is called at once. A second one does not wait.

    Only where Python's own handler is in place: one of the trainer's own, and threads other than the main one, stay as they are.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            signal.default_int_handler(number, frame)
        interrupted = True
        noticed()

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupted:
            raise KeyboardInterrupt
