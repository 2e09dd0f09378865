"""What the service says of a finished step and of a state that it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .error import MuondError
from .wire.frame import Frame


@dataclass(frozen=True)
class Receipt:
    """A finished step; docs/protocol.md, "receipt"."""

    step: int
    replayed: bool
    applied: int
    skipped: int
    gradient_norm: float
    groups: Mapping[str, Mapping[str, object]]
    clipped_heads: Mapping[str, int]
    digest: str
    durable: bool
    seconds: Mapping[str, float]
    max_logit: float | None = None
    contributors: Sequence[Mapping[str, float]] = ()
    """With several replicas those that the step is the mean of: ``replica`` and ``weight`` of each, in order."""
    contributed: bool = True
    """Whether this client's replica is one of them. One that was late has the updates of the others all the same."""
    refused: tuple[MuondError, ...] = ()
    """The errors of gradients that the service refused, if the step was to end without them; they count as skipped."""

    @classmethod
    def of(cls, frame: Frame, refused: tuple[MuondError, ...]) -> Receipt:
        """From a receipt frame; keys that this version does not know are left out."""
        known = {key: value for key, value in frame.items() if key in cls.__dataclass_fields__}
        return cls(**known, refused=refused)


@dataclass(frozen=True)
class Checkpoint:
    """A state that the service keeps."""

    id: str
    step: int
    digest: str
    bytes: int
