"""A step of a whole, cut into the steps of its shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..error import ErrorFields, MuondError
from ..steps.parameter import Bound
from ..steps.step import Gradient, Step
from ..steps.updates import Update
from ..transport.arenas import Arenas
from ..wire.frame import Frame
from .placement import Placement, attentions_of


class ShardArenas:
    """The memory that is shared with the process of one shard, under the indices of the whole."""

    def __init__(self, own: Arenas, local: dict[int, int]) -> None:
        self.own = own
        self._local = local

    @property
    def kind(self) -> str:
        return self.own.kind

    def gradient(self, index: int) -> Any:
        return self.own.gradient(self._local[index])

    def gradient_bytes(self, index: int) -> memoryview:
        return self.own.gradient_bytes(self._local[index])


class Cut:
    """Which shard has which parameter of the whole, under which index."""

    def __init__(self, placement: Placement, frame: Frame) -> None:
        self.indices = [shard.parameters for shard in placement.shards]
        self.locals = [{index: position for position, index in enumerate(indices)} for indices in self.indices]
        self.shard_of = {index: shard for shard, indices in enumerate(self.indices) for index in indices}
        self.attentions = [{str(a["name"]) for a in attentions_of(frame, indices)} for indices in self.indices]

    def bound(self, parameters: Sequence[Bound], shard: int) -> list[Bound]:
        """The parameters of a shard, as that counts them."""
        return [replace(parameters[index], index=i) for i, index in enumerate(self.indices[shard])]

    def wants(self, shard: int, attention: str) -> bool:
        """Whether a shard is told the logits of this attention. All are told of one that there is not: all refuse it, or some
        would go on without."""
        return attention in self.attentions[shard] or not any(attention in names for names in self.attentions)

    def error(self, error: BaseException, shard: int) -> BaseException:
        """An error of a shard, about the parameter as the whole counts it."""
        if not isinstance(error, MuondError) or error.fields.parameter is None:
            return error
        fields = replace(error.fields, parameter=self.indices[shard][error.fields.parameter])
        return _with_fields(error, fields)


class Shares:
    """The steps of the shards; told of the gradients of the whole, under its indices."""

    def __init__(self, step: Step, cut: Cut) -> None:
        self.number = step.number
        self._cut = cut
        self.steps = [step.part(lambda name, shard=i: cut.wants(shard, name)) for i in range(len(cut.indices))]  # type: ignore[misc]

    def add(self, gradients: Sequence[Gradient]) -> None:
        by_shard: defaultdict[int, list[Gradient]] = defaultdict(list)
        for gradient in gradients:
            shard = self._cut.shard_of[gradient.parameter]
            arenas = gradient.arenas.own if isinstance(gradient.arenas, ShardArenas) else gradient.arenas
            local = self._cut.locals[shard][gradient.parameter]
            by_shard[shard].append(replace(gradient, parameter=local, arenas=arenas))
        for shard, own in by_shard.items():
            self.steps[shard].add(own)

    def finish(self, skipped: Sequence[int], weight: float | None) -> None:
        for local, step in zip(self._cut.locals, self.steps, strict=True):
            step.finish([local[index] for index in skipped if index in local], weight)


def of_whole(update: Update, parameters: Sequence[Bound], indices: Sequence[int]) -> Update:
    """An update of a shard whose parameters have these indices, as one of the whole."""
    return replace(update, parameter=parameters[indices[update.parameter.index]])


def together(errors: Sequence[MuondError]) -> MuondError:
    """The first of the errors, which names what all of them have refused."""
    refused = tuple(name for error in errors for name in error.fields.refused)
    return _with_fields(errors[0], replace(errors[0].fields, refused=refused))


def _with_fields(error: MuondError, fields: ErrorFields) -> MuondError:
    told = MuondError(error.code, error.message, fields, status=error.status, retryable=error.retryable)
    told.__cause__ = error
    return told
