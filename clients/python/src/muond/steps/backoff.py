"""How long to wait before another attempt."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Waits between attempts, in seconds."""

    first_seconds: float = 0.1
    """The longest first wait; each further one may be twice as long."""
    most_seconds: float = 10.0
    """No wait is longer, unless the service named one itself."""
    random: Callable[[], float] = random.random
    """A number in [0, 1). Give a seeded one to repeat the waits."""

    def seconds(self, attempt: int, at_least: float = 0.0) -> float:
        """The wait before attempt ``attempt``, from 0.

        Half of an exponentially growing bound is certain, half is random, so that the clients of a service that restarted do
        not all come back at once.
        """
        bound = min(self.most_seconds, self.first_seconds * 2.0 ** min(attempt, 64))
        return at_least + bound * (0.5 + 0.5 * self.random())
