"""The REST interface to a whole: its place is the head's to tell, its state lies with its shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar
from urllib.parse import quote

from ..error import ErrorFields, MuondError
from ..rest import Rest, Take, Tensor
from ..transport.address import another

T = TypeVar("T")


class WholeRest(Rest):
    """Requests go to the head, and from there to the processes that it names. Every method raises MuondError."""

    def run(self, run: str) -> dict[str, Any]:
        """The step and the digest of the whole; ``ahead`` has the parameters of which a shard has a later step."""
        whole = self._whole(run)
        ahead: list[int] = []
        for shard, found in zip(
            whole["shards"], self._of_shards(whole, lambda rest, name: rest.run(name)), strict=True
        ):
            indices = [index for start, stop in shard["parameters"] for index in range(start, stop)]
            is_done = found["step"] > whole["step"]
            ahead += indices if is_done else [indices[position] for position in found["ahead"]]
        return {**whole, "ahead": sorted(ahead)}

    def has_checkpoints(self, run: str, *, tagged: bool = False) -> bool:
        found = self._of_shards(self._whole(run), lambda rest, name: rest.has_checkpoints(name, tagged=tagged))
        return any(found)

    def state(self, run: str) -> tuple[list[Tensor], dict[str, str]]:
        """As of a run of one process. Raises STEP_CONFLICT where a step has ended meanwhile."""
        whole = self._whole(run)
        states = self._of_shards(whole, lambda rest, name: rest.state(name))
        steps = [int(metadata["step"]) for _, metadata in states]
        if any(step != whole["step"] for step in steps) or self._whole(run)["digest"] != whole["digest"]:
            message = f"the shards of run '{run}' are at steps {steps}, the whole was at {whole['step']}: read it between two steps"
            raise MuondError("STEP_CONFLICT", message, ErrorFields(expected_step=whole["step"] + 1))
        tensors = [tensor for tensors, _ in states for tensor in tensors]
        # The counts of all come first, as those of one process do.
        tensors.sort(key=lambda tensor: not tensor.name.endswith(".step"))
        return tensors, {"step": str(whole["step"]), "digest": whole["digest"]}

    def read_state(self, run: str, begin: Callable[[], Take]) -> dict[str, str]:
        tensors, metadata = self.state(run)
        take = begin()
        for tensor in tensors:
            take(tensor)
        return metadata

    def counts(self, run: str) -> list[Tensor]:
        found = self._of_shards(self._whole(run), lambda rest, name: rest.counts(name))
        return [tensor for counts in found for tensor in counts]

    def delete_unused(self, run: str) -> None:
        """Deletes a whole unless a process has something of one of its shards: then it stays as it is."""
        whole = self._whole(run)
        if whole["step"] == 0 and not any(self._of_shards(whole, _has_state)):
            self.delete(run)

    def _whole(self, run: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/runs/{quote(run, safe='')}/shards")

    def _of_shards(self, whole: dict[str, Any], ask: Callable[[Rest, str], T]) -> Sequence[T]:
        """One shard after the other: each fills the network by itself."""
        answers: list[T] = []
        with ExitStack() as open_ones:
            for shard in whole["shards"]:
                rest = Rest(
                    another(shard["peer"], self._endpoint), self._retries, self._backoff, timeout_seconds=self._seconds
                )
                answers.append(ask(open_ones.enter_context(rest), shard["run"]))
        return answers


def _has_state(rest: Rest, shard: str) -> bool:
    """Whether anything was ever applied to a shard, or may have been: nobody can say so of one that cannot be read."""
    try:
        found = rest.run(shard)
    except MuondError as error:
        return error.code != "RUN_NOT_FOUND"
    return bool(found["step"] or found["ahead"])
