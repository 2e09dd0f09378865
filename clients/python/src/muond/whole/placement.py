"""Which parameters of a whole each shard has, and where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..error import MuondError
from ..transport.address import Endpoint, another
from ..wire.frame import Frame

# What a shard is told as it was said of the whole.
_OF_ALL = ("type", "protocol", "mode", "groups", "member", "takeover", "client")
_ROWS = ("query", "key", "query_bias", "key_bias")


@dataclass(frozen=True)
class Place:
    """A shard and the process that has it."""

    run: str
    endpoint: Endpoint
    parameters: tuple[int, ...]
    """Their indices in the whole. The shard counts its own in this order, from 0."""
    checkpoint: str | None
    """The one that the shard is to be opened at, if any."""


@dataclass(frozen=True)
class Placement:
    """What ``placed`` says of the shards."""

    generation: int
    shards: tuple[Place, ...]

    @staticmethod
    def of(placed: Frame, parameters: int, head: Endpoint) -> Placement:
        """Reads the frame of the ``head``. Raises MuondError unless each of so many parameters is in one shard."""
        try:
            shards = tuple(_place(shard, head) for shard in placed["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise MuondError("FRAME_MALFORMED", f"the service sent placed with {error!r} in its shards") from error
        listed = sorted(index for shard in shards for index in shard.parameters)
        if listed != list(range(parameters)) or not all(shard.parameters for shard in shards):
            message = (
                f"run '{placed['run']}' of {parameters} parameters was placed with {listed} in {len(shards)} shards"
            )
            raise MuondError("FRAME_UNEXPECTED", message)
        return Placement(placed["generation"], shards)

    def require_same_cut(self, other: Placement) -> None:
        """Raises MuondError for another placement that has other parameters in a shard."""
        if [shard.parameters for shard in self.shards] != [shard.parameters for shard in other.shards]:
            raise MuondError(
                "RUN_MISMATCH",
                f"run '{self.shards[0].run}' and its other shards have other parameters than when they were opened: was it made anew?",
            )

    def opening(self, frame: Frame, shard: int) -> Frame:
        """What opens a shard of the whole that ``frame`` has opened."""
        place = self.shards[shard]
        local = {index: position for position, index in enumerate(place.parameters)}
        attentions = attentions_of(frame, place.parameters)
        given: Frame = {
            "run": place.run,
            "shard": {"index": shard, "generation": self.generation},
            "parameters": [frame["parameters"][index] for index in place.parameters],
            "attentions": [_counted(attention, local) for attention in attentions] or None,
            "checkpoint": place.checkpoint,
        }
        of_all = {key: frame[key] for key in _OF_ALL if key in frame}
        return {**of_all, **{key: value for key, value in given.items() if value is not None}}


def attentions_of(frame: Frame, parameters: Sequence[int]) -> list[Mapping[str, Any]]:
    """The attentions of an ``open`` frame whose rows lie in these parameters; those of one lie in one shard."""
    return [a for a in frame.get("attentions", []) if a["query"]["parameter"] in parameters]


def _place(shard: Mapping[str, Any], head: Endpoint) -> Place:
    indices = tuple(index for start, stop in shard["parameters"] for index in range(start, stop))
    return Place(str(shard["run"]), another(shard["url"], head), indices, shard.get("checkpoint"))


def _counted(attention: Mapping[str, Any], local: Mapping[int, int]) -> dict[str, Any]:
    return {
        key: {**value, "parameter": local[value["parameter"]]} if key in _ROWS else value
        for key, value in attention.items()
    }
