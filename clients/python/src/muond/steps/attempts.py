"""When something that failed is worth another attempt."""

from __future__ import annotations

from dataclasses import dataclass

from ..error import MuondError
from .backoff import Backoff


@dataclass
class Attempts:
    """Counts consecutive failures of one thing that is tried again and again."""

    retries: int
    """Consecutive failures that are forgiven."""
    backoff: Backoff
    _failures: int = 0

    @property
    def is_first(self) -> bool:
        """Whether there was one failure since there was progress."""
        return self._failures <= 1

    def wait_after(self, error: MuondError, *, progress: bool = False) -> float | None:
        """Seconds to wait before the next attempt; None when there should be none.

        ``progress``: the attempt got further than those before it, so they do not count any more.
        """
        self._failures = 1 if progress else self._failures + 1
        # A quorum was waited for that often over one connection already: another one brings no replica.
        if not error.retryable or error.code == "QUORUM_LOST" or self._failures > self.retries:
            return None
        return self.backoff.seconds(self._failures - 1, error.fields.retry_after_seconds or 0.0)
