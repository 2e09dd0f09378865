"""What the trainer said about one step, kept until its receipt so that all of it can be sent again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..wire.frame import Frame


@dataclass(frozen=True)
class Gradient:
    """A gradient's bytes, held by reference. ``ready`` returns once they are there (a copy from a GPU may be under way)."""

    parameter: int
    data: memoryview
    ready: Callable[[], None] | None = None


class Step:
    """It grows in the trainer's thread while another thread sends it; ``changed`` is notified of every growth."""

    def __init__(self, number: int, options: Mapping[str, Any], *, skip_refused: bool = False) -> None:
        self.number = number
        said = {key: value for key, value in options.items() if value is not None}
        self.frame: Frame | None = {"type": "step", "step": number, **said} if said else None
        self.skip_refused = skip_refused
        """Whether the step is ended without the gradients that the service refuses; else it is not ended."""
        self.changed = threading.Condition()
        self.gradients: list[Gradient] = []
        self.skipped: Sequence[int] | None = None
        """Parameters without a gradient; set once all gradients are there."""
        self._parameters: set[int] = set()

    def has(self, parameter: int) -> bool:
        return parameter in self._parameters

    def add(self, gradient: Gradient) -> None:
        with self.changed:
            self._parameters.add(gradient.parameter)
            self.gradients.append(gradient)
            self.changed.notify_all()

    def finish(self, skipped: Sequence[int]) -> None:
        with self.changed:
            self.skipped = skipped
            self.changed.notify_all()
