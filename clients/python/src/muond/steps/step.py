"""What the trainer said about one step, kept until its receipt so that all of it can be sent again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..transport.arenas import GradientSlots
from ..wire.frame import Frame
from .owed import Groups


@dataclass(frozen=True)
class Gradient:
    """A gradient's bytes, held by reference. ``ready`` returns once they are there (a copy from a GPU may be under way)."""

    parameter: int
    data: memoryview | None
    """None for one that lies in its slot of shared memory."""
    ready: Callable[[], None] | None = None
    arenas: GradientSlots | None = None
    """The shared memory that it lies in."""

    @property
    def bytes(self) -> memoryview:
        if self.data is not None:
            return self.data
        assert self.arenas is not None, "a gradient without data lies in shared memory"
        return self.arenas.gradient_bytes(self.parameter)


MaxLogits = Mapping[str, Sequence[float]]
"""{attention: the largest softmax input of each query head}."""


class Follower(Protocol):
    """Who goes on with what the trainer says of a step."""

    def add(self, gradients: Sequence[Gradient]) -> None: ...
    def finish(self, skipped: Sequence[int], weight: float | None) -> None: ...


class Step:
    """It grows in the trainer's thread while another thread sends it; ``changed`` is notified of every growth."""

    def __init__(
        self,
        number: int,
        options: Mapping[str, Any],
        max_logits: MaxLogits | Callable[[], MaxLogits] | None = None,
        *,
        skip_refused: bool = False,
    ) -> None:
        self.number = number
        self._options = {key: value for key, value in options.items() if value is not None}
        self._max_logits = max_logits
        self.skip_refused = skip_refused
        """Whether the step is ended without the gradients that the service refuses; else it is not ended."""
        self.changed = threading.Condition()
        self.gradients: list[Gradient] = []
        self.skipped: Sequence[int] | None = None
        """Parameters without a gradient; set once all gradients are there."""
        self.weight: float | None = None
        """Of the replica in the mean of several."""
        self.left_out: dict[int, Frame] = {}
        """The refusals of gradients that the step is ended without, by parameter, also those of earlier connections. Such a
        gradient is not sent again: once the step has ended without it, the service would refuse it with STEP_CONFLICT."""
        self._parameters: set[int] = set()
        self._follower: Follower | None = None

    def part(self, wanted: Callable[[str], bool]) -> Step:
        """A step with the same number and options, without gradients, and with the logits of those attentions that are wanted."""

        def max_logits() -> MaxLogits:
            return {name: values for name, values in (self._logits() or {}).items() if wanted(name)}

        measured = None if self._max_logits is None else max_logits
        return Step(self.number, self._options, measured, skip_refused=self.skip_refused)

    def lead(self, follower: Follower) -> None:
        """Has a follower told of all gradients, those that are there and those that come, and of the end."""
        with self.changed:
            self._follower = follower
            follower.add(self.gradients)
            if self.skipped is not None:
                follower.finish(self.skipped, self.weight)

    def _logits(self) -> MaxLogits | None:
        return self._max_logits() if callable(self._max_logits) else self._max_logits

    def frame(self) -> Frame | None:
        """What is said before the gradients, if anything. The sending thread asks: logits may still be on their way from a GPU."""
        max_logits = self._logits()
        said = {**self._options, **({} if max_logits is None else {"max_logits": max_logits})}
        return {"type": "step", "step": self.number, **said} if said else None

    @property
    def groups(self) -> Groups:
        """The hyperparameters that are said with it."""
        groups: Groups = self._options.get("groups", {})
        return groups

    def has(self, parameter: int) -> bool:
        return parameter in self._parameters

    def add(self, gradients: Sequence[Gradient]) -> None:
        with self.changed:
            self._parameters.update(gradient.parameter for gradient in gradients)
            self.gradients.extend(gradients)
            if self._follower is not None:
                self._follower.add(gradients)
            self.changed.notify_all()

    def finish(self, skipped: Sequence[int], weight: float | None = None) -> None:
        with self.changed:
            self.skipped, self.weight = skipped, weight
            if self._follower is not None:
                self._follower.finish(skipped, weight)
            self.changed.notify_all()
