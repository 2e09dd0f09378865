"""A torch optimizer whose state lives in a service."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch._compile import _disable_dynamo
from typing_extensions import Unpack

from ..connection import Connection
from ..error import ErrorFields, MuondError
from ..receipt import Checkpoint, Receipt
from ..rest import Rest
from ..run import Run
from ..steps.asking import at_first
from ..steps.interrupt import interrupt_later
from ..transport.address import Endpoint, addresses
from .checks import check_values
from .copies import Copies
from .feedback import Feedback
from .finite import nonfinite
from .grouping import common_values, complete_group, resolve_groups, with_names
from .home import Home
from .hyperparameters import changes
from .joining import others_of, wrapped_with
from .parts import Parts
from .preset import with_preset
from .progress import Progress
from .settings import Options, Settings, settings
from .shards import is_sharded, local
from .slots import Slot, make_slots
from .staging import Staging
from .state.kept import Shelf
from .state.late_momentum import begin_late_momentum
from .state.loading import load
from .state.matching import TOKEN, Loaded, match
from .state.packing import in_order, packed
from .state.place import place_of
from .state.restoring import go_back
from .state.saving import collector_paused, saved
from .state.view import State
from .streaming import Streaming

# Elements of gradients that are given to the run at a time, but for a larger one; by transport, for those on a GPU.
_TOGETHER = 1 << 18
_TOGETHER_ON = {"websocket": _TOGETHER, "shm": 1 << 23, "cuda-ipc": 1 << 62}

Params = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]


class Optimizer(torch.optim.Optimizer):
    """Any algorithm of the service, one for each group; all groups are one run.

    ``params``: ``model.named_parameters()`` with ``groups=`` (maps of ``parameters``: names or patterns, ``algorithm`` or
    ``preset``, ``name`` and hyperparameters, or ``muond.torch.suggest(model)``), or param_groups of torch with those keys.
    The other keywords are those of ``muond.torch.settings.Settings``.

    The run is opened with the first step (or by ``open()``), so that parameters can be moved and groups added before it.
    Raises MuondError if there is no service or the key is wrong, ValueError and TypeError for what no run can have.
    """

    def __init__(
        self, params: Params, groups: Sequence[Mapping[str, Any]] | None = None, **options: Unpack[Options]
    ) -> None:
        self._begin(resolve_groups(params, groups), {}, settings(options))

    def _begin(self, params: Any, defaults: dict[str, Any], given: Settings) -> None:
        self._ready = False
        self._settings = given
        self._addresses = addresses(given.url, token=given.token, headers=given.headers, ssl_context=given.ssl_context)
        # What belongs to the optimizer must not keep it alive.
        reference = weakref.ref(self)
        self._home = Home(given, self._addresses, lambda: _alive(reference).param_groups)
        home = self._home
        self._feedback = Feedback(lambda: home.state) if given.error_feedback else None
        self._staging = Staging(self._feedback)
        self._streaming: Streaming | None = None
        self._opening = threading.RLock()
        self._stepping = threading.RLock()
        self._shelf = Shelf(given.keep_last)
        self._known_presets: Mapping[str, Any] | None = None
        self._begun_with: dict[str, dict[str, Any]] = {}
        self._progress: Progress | None = None
        self.receipt: Receipt | None = None
        """Of the last finished step."""
        self._inherited = defaults
        super().__init__(params, defaults)
        self.defaults = defaults or common_values(self.param_groups)
        # What is wrong with a parameter, the address or the key should be heard of here, not after the first backward pass.
        self._join()
        self._progress = Progress(self._home.name) if given.progress else None
        at_first(self._addresses, Connection).close(MuondError("CLIENT_CLOSED", "the service was only looked for"))
        if given.overlap:
            self._attach()
        self._ready = True

    def _join(self) -> None:
        """Finds the processes that have the run together: the parameters say who has what of them."""
        self._home.join(*others_of(self._slots(), self._settings))

    def _join_late(self) -> None:
        """Finds the other processes with the first step.

        Accelerate shards the model after the optimizer was made of it, and puts the shards into its param_groups; a
        DistributedDataParallel may be made later as well.
        """
        home = self._home
        if home.run is not None or home.ranks is not None or home.copies is not None:
            return
        if any(is_sharded(p) for g in self.param_groups for p in g["params"]):
            self._join()
            return
        parts = wrapped_with([p for each in self.param_groups for p in each["params"]], self._slots, self._settings)
        if parts is not None:  # pragma: no cover - in processes of several ranks, which are not measured
            self._home.join(parts, None)

    def _slots(self) -> list[Slot]:
        return make_slots(self.param_groups, self._settings)

    # Life

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def run(self) -> Run:
        """The run, which this opens if it is not open."""
        return self.open()

    @property
    def run_name(self) -> str:
        """The run's name. Parameters that are added or replaced later make it another run, with the same state."""
        return self._home.name

    @property
    def step_count(self) -> int:
        """The last finished step of the run, 0 before it is open."""
        return self._home.step_count

    def open(self) -> Run:
        """Opens the run, which the first step does by itself. Raises MuondError RUN_EXISTS, RUN_MISMATCH, OVER_CAPACITY…"""
        with self._opening:
            self._join_late()
            return self._home.run or self._home.open(self._settings.mode, self._settings.checkpoint)

    def close(self, *, delete: bool = False) -> None:
        """Closes the connection; the run and its state stay in the service, unless ``delete``."""
        if self._streaming is not None:
            self._streaming.detach()
        if self._progress is not None:
            self._progress.close()
        self._home.close(delete=delete)

    # torch.optim.Optimizer

    @property  # type: ignore[override]
    def state(self) -> State:
        """{parameter: {name: tensor}} as torch has it: read from the service, all of it in one request, when it is looked at.

        What is written, deleted or changed in place is carried out before the next step. Entries of other names are the program's
        own and stay here. Raises MuondError; RuntimeError while a step is under way.
        """
        return self._home.state

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        # The constructor of torch.optim.Optimizer sets an empty one, which is no wish.
        if self._ready:
            self._home.state.replace(state)

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch. After the first step the next one goes on with these parameters as well, in a run of another name."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if param_group.get("preset") is not None:
            param_group = with_preset(param_group, self._presets())
        super().add_param_group(complete_group(param_group, self._inherited))
        try:
            if self._ready:
                make_slots(self.param_groups, self._settings)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _presets(self) -> Mapping[str, Any]:
        if self._known_presets is None:
            # Not tried again, like the first connection: a wrong address should be heard of at once.
            self._known_presets = at_first(self._addresses, _presets_at)
        return self._known_presets

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._give_up_half_step()
        super().zero_grad(set_to_none)

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step: returns the receipt, or with a closure what the closure returned (``receipt`` has the other).

        None for a step that is none: every parameter is frozen, or a gradient has NaN or Inf (``on_nonfinite``).

        Raises MuondError. A step that raised can be taken again, as long as the gradients are the same; nothing is applied twice.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._join_late()
        receipt = self._take_with_others()
        return receipt if closure is None else loss

    def _take_with_others(self) -> Receipt | None:
        if self._home.copies is not None:
            return self._take_together(self._home.copies)
        if self._home.parts is not None:
            return self._take_part(self._home.parts)
        return self._take_step()

    def _take_part(self, parts: Parts) -> Receipt | None:
        """Takes this rank's part of a step, and then has the weights of all.

        Where it raises with the step in flight the others wait for this rank to take it again, as for one that is slow.
        """
        before = self.step_count
        receipt: Receipt | None = None
        error: BaseException | None = None
        try:
            receipt = self._take_step()
        except BaseException as failed:
            if self.step_count == before:
                raise
            error = failed
        if self.step_count != before:  # pragma: no branch - a step that did not end is raised at once
            parts.share(self._home.slots)
        if error is not None:
            raise error
        return receipt

    def _take_step(self) -> Receipt | None:
        with self._stepping:
            if self._home.run is None and not self._has_gradients():
                # Every parameter is frozen: there is nothing that a run could have.
                return self.receipt
            run = self._prepared()
            if run is None:
                return None
            try:
                # Ctrl-C waits until the step is finished, or the next one could not begin.
                with interrupt_later(run.hurry):
                    return self._took(self._send_and_end(run))
            finally:
                self._home.state.moved()
                if self._streaming is not None:
                    self._streaming.reset()
                    self._streaming.attach()

    def _take_together(self, copies: Copies) -> Receipt | None:
        """Takes a step, or has the process take it that has the run; then this one has its weights."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad or p.grad is not None]
        receipt = copies.take(self._take_step, [local(p) for p in trained])
        at = copies.from_first(None if self._home.run is None else place_of(self._home.run))
        if copies.is_first or at is None:
            return receipt
        self._home.follow(at)
        self._home.state.moved()
        self.receipt = receipt or self.receipt
        return receipt

    def _has_gradients(self) -> bool:
        return any(p.requires_grad or p.grad is not None for group in self.param_groups for p in group["params"])

    def _prepared(self) -> Run | None:
        """The run, with its step begun; None for a step that is skipped.

        Raises before anything is sent: a step is not begun that cannot be ended.
        """
        run = self.open()
        if run.in_flight:
            self._check_gradients()
            self._check_unchanged(run)
            return run
        run = self._carried_out()
        self._check_gradients()
        if self._is_skipped(run):
            return None
        self._begin_step(run)
        return run

    def _is_skipped(self, run: Run) -> bool:
        """Whether a gradient has NaN or Inf and the step is not to be. Raises MuondError GRADIENT_NOT_FINITE if that is asked for."""
        if self._settings.overlap:
            return False
        ranks = self._home.ranks
        if self._settings.on_nonfinite == "skip_parameter":
            # Whatever the others say: all are here then, and none still reads the state that this step will move.
            if ranks is not None:
                ranks.any(False)
            return False
        if run.transport == "cuda-ipc":  # pragma: no cover - needs a GPU
            rows = [(s, s.gradient, self.param_groups[s.group]) for s in self._home.slots]
            given = [(slot, gradient, group) for slot, gradient, group in rows if gradient is not None]
            if not given or self._staging.place_finite(run, given):
                return False
        names = tuple(slot.name for slot in nonfinite(self._home.slots))
        # Of a step that is skipped by one rank none may be computed by another.
        if ranks is not None and ranks.any(bool(names)):
            names = tuple(dict.fromkeys(name for those in ranks.of_all(names) for name in those))
        if not names:
            return False
        step = run.step_count + 1
        listed = ", ".join(f"'{name}'" for name in names[:3]) + (
            f" and {len(names) - 3} more" if len(names) > 3 else ""
        )
        message = f"the gradient of {listed} for step {step} has NaN or Inf (or has it once it is rounded to its gradient_dtype)"
        if self._settings.on_nonfinite == "raise":
            raise MuondError(
                "GRADIENT_NOT_FINITE",
                f"{message}: nothing has moved",
                ErrorFields(step=step, refused=names),
                status=422,
            )
        warnings.warn(f"{message}: the step is skipped, nothing has moved", RuntimeWarning, stacklevel=9)
        return True

    def _carried_out(self) -> Run:
        """The run as param_groups and ``state`` are now."""
        begin_late_momentum(self._home)
        if self._home.carry_out():
            self._staging = Staging(self._feedback)
            # What was kept is of another run, with other parameters.
            self._shelf = Shelf(self._settings.keep_last)
            if self._streaming is not None:
                self._streaming.detach()
                self._attach()
        return self.run

    def _send_and_end(self, run: Run) -> Receipt:
        left = [slot for slot in self._home.slots if not run.has_gradient(slot.index)]
        skipped = [slot.index for slot in left if slot.tensor.grad is None]
        given = [(slot, gradient) for slot in left if (gradient := slot.gradient) is not None]
        on_gpu = any(gradient.is_cuda for _, gradient in given)
        # The first ones leave while the others are rounded; a GPU does many in one launch.
        for together in _together(given, _TOGETHER_ON.get(run.transport if on_gpu else "websocket", _TOGETHER)):
            self._send(run, together, borrow=True)
        return run.end(skipped=skipped)

    def _send(self, run: Run, gradients: Sequence[tuple[Slot, torch.Tensor]], *, borrow: bool) -> None:
        rows = [(slot, gradient, self.param_groups[slot.group]) for slot, gradient in gradients]
        self._staging.send(run, rows, borrow=borrow)

    def _took(self, receipt: Receipt) -> Receipt:
        self._finished(receipt)
        self._measure_after(receipt.step)
        if self._progress is not None:
            self._progress.show(receipt)
        if self._settings.callback is not None:
            self._settings.callback(receipt)
        if receipt.refused and self._settings.on_nonfinite != "skip_parameter":
            first = receipt.refused[0]
            names = tuple(self._home.slots[error.fields.parameter or 0].name for error in receipt.refused)
            message = f"{first.message}; step {receipt.step} was ended without {', '.join(names)}"
            raise MuondError(first.code, message, ErrorFields(step=receipt.step, refused=names), status=first.status)
        return receipt

    def _finished(self, receipt: Receipt) -> None:
        self.receipt = receipt
        if self._feedback is not None:
            self._feedback.finish(
                {error.fields.parameter for error in receipt.refused}, contributed=receipt.contributed
            )

    def _begin_step(self, run: Run) -> None:
        if self._feedback is not None:
            self._feedback.begin()
        max_logits = self._settings.max_logits
        self._begun_with = self._changed_groups(run)
        # Hyperparameters of a run with members are rank 0's to give.
        ranks = self._home.ranks
        groups = self._begun_with if ranks is None or ranks.rank == 0 else None
        run.begin(
            groups=groups or None,
            max_logits=None if max_logits is None else max_logits.reading(),
            skip_refused=True,
        )

    def _changed_groups(self, run: Run) -> dict[str, dict[str, Any]]:
        pairs = zip(self._home.group_names, self.param_groups, strict=True)
        changed: dict[str, dict[str, Any]] = {}
        for name, group in pairs:
            values = changes(group, run.groups[name])
            if values:
                check_values(group)
                changed[name] = values
        return changed

    def _check_gradients(self) -> None:
        """Before anything is sent: a step is not begun that cannot be ended."""
        for slot in self._home.slots:
            if slot.tensor.grad is not None:
                _check_gradient(slot, slot.tensor.grad)

    # Overlap

    def _attach(self) -> None:
        # The hooks belong to the model, which may outlive this optimizer, and must not keep it alive.
        reference = weakref.ref(self)

        def send(slot: Slot, gradient: torch.Tensor) -> None:
            optimizer = reference()
            assert optimizer is not None, "its hooks go with it"
            optimizer._stream(slot, gradient)

        self._streaming = Streaming(
            make_slots(self.param_groups, self._settings, known=self._home.slots),
            self._settings.accumulation_steps,
            send,
        )
        self._streaming.attach()
        weakref.finalize(self, self._streaming.detach)

    def _stream(self, slot: Slot, gradient: torch.Tensor) -> None:
        with torch.no_grad():
            run = self.open()
            if not run.in_flight:
                run = self._carried_out()
            declared = self._home.slot_of(slot.tensor)
            if declared is None:
                return
            _check_gradient(declared, gradient)
            if not run.in_flight:
                self._begin_step(run)
            self._send(run, [(declared, gradient)], borrow=False)

    def _check_unchanged(self, run: Run) -> None:
        """What was sent during the backward pass is what the trainer still wants, or the step must not be taken."""
        names = [] if self._streaming is None else self._streaming.changed()
        if names:
            raise RuntimeError(
                f"the gradient of '{names[0]}' was changed after overlap=True had sent it ({len(names)} in all): "
                "gradient clipping, GradScaler and whatever else changes gradients between backward() and step() need overlap=False"
            )
        if self._home.changed():
            raise RuntimeError(
                f"parameters or optimizer.state were changed after overlap=True had begun to send step {run.step_count + 1}: "
                "change them before backward()"
            )
        wanted = self._changed_groups(run)
        if wanted != self._begun_with:
            raise RuntimeError(
                f"hyperparameters were changed after overlap=True had begun to send step {run.step_count + 1}: "
                f"it began with {self._begun_with}, now it would be {wanted}; change them before backward()"
            )

    def _give_up_half_step(self) -> None:
        """Ends a step whose backward pass failed with some gradients sent: those parameters take it, the others do not."""
        run, streaming = self._home.run, self._streaming
        if streaming is None:
            return
        # What was counted of an accumulation goes with its gradients.
        streaming.reset()
        if run is None or run.closed or not run.in_flight:
            return
        slots = self._home.slots
        skipped = [slot.index for slot in slots if not run.has_gradient(slot.index)]
        receipt = run.end(skipped=skipped)
        self._finished(receipt)
        self._home.state.moved()
        warnings.warn(
            f"step {receipt.step} was left with {len(slots) - len(skipped)} of {len(slots)} gradients sent, "
            "and was ended with those",
            stacklevel=3,
        )

    # State

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, complete in itself: param_groups, and the state read from the service, in host memory.

        With ``state="checkpoint"`` the service keeps the state, and the dictionary the checkpoint's id. Raises MuondError.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with collector_paused():
            entries, token = saved(self._home)
            groups, number_of = packed(self.param_groups)
            state = {
                number_of.get(id(key), key) if isinstance(key, torch.Tensor) else key: value
                for key, value in in_order(entries, number_of)
            }
            answer: dict[str, Any] = {
                "state": state,
                "param_groups": groups,
                **({} if token is None else {TOKEN: token}),
            }
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, answer)
            answer = answer if changed is None else changed
        return answer

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the state of a state_dict, from this package or from the torch optimizer of the same name.

        If the service has the very tensors of the dictionary already, nothing is sent; else it goes back to the dictionary's
        checkpoint, or takes its tensors. A state of another optimizer that lives is copied, into a run of this one's own.
        Of sharded parameters it may have been written by any number of ranks, and rank 0 puts it together.
        Raises MuondError; ValueError if the groups differ. Nothing has changed then.
        """
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else changed
        loaded = match(given, self.param_groups)
        for group in loaded.groups:
            check_values(group)
        with self._opening:
            self._join_late()
            self._load(given.get(TOKEN) or {}, loaded)
            self.param_groups = loaded.groups
        if self._streaming is not None:
            self._streaming.reset()
        if self._home.run is not None:
            self._measure_after(self._home.run.step_count)
        if self._progress is not None:
            self._progress.start(self.step_count)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # Checkpoints

    def checkpoint(self, tag: str | None = None) -> Checkpoint:
        """Has the service keep its state of this step; with ``keep="cpu"`` the weights are kept here. Raises MuondError."""
        run = self.open()
        checkpoint = run.checkpoint(tag) if tag is not None or self._settings.keep is None else None
        if self._settings.keep is not None:
            checkpoint = self._shelf.keep(run, self._home.slots, self.param_groups, self._feedback)
        assert checkpoint is not None
        return checkpoint

    def _load(self, token: Mapping[str, Any], loaded: Loaded) -> None:
        home, copies = self._home, self._home.copies
        if copies is None:
            load(home, token, loaded, loaded.groups)
        else:  # pragma: no cover - in processes of several copies, which are not measured
            self._load_copies(copies, token, loaded)

    def _load_copies(
        self, copies: Copies, token: Mapping[str, Any], loaded: Loaded
    ) -> None:  # pragma: no cover - in processes of several copies, which are not measured
        home = self._home
        copies.take(lambda: load(home, token, loaded, loaded.groups), [])
        at = copies.from_first(None if home.run is None else place_of(home.run))
        if home.follows and at is not None:
            home.follow(at)
            home.state.moved()

    def rollback(self) -> int:
        """Goes back to the last step for which the service has the state and this process the weights (``keep="cpu"``).

        Weights and param_groups are those of that step afterwards, and no parameter has a gradient; schedulers, buffers of the
        model and data are the caller's. Returns the step. Raises MuondError.
        """
        run = self.open()
        kept = go_back(run, self._shelf)
        if self._streaming is not None:
            self._streaming.reset()
        kept.restore(self._home.slots, self.param_groups)
        self._home.state.moved()
        if self._feedback is not None:
            self._feedback.go_back((slot.tensor for slot in self._home.slots), kept.feedback)
        self._measure_after(run.step_count)
        return run.step_count

    def _measure_after(self, step: int) -> None:
        if self._settings.max_logits is not None:
            self._settings.max_logits.reset(step)

    # Copies: each has a run of its own, and the state

    def __getstate__(self) -> dict[str, Any]:
        """For pickle. What is secret stays here: key and headers are those of the environment where it is loaded."""
        if self._settings.max_logits is not None:
            raise TypeError(
                f"{type(self).__name__} of run '{self.run_name}' cannot be pickled: its max_logits measures the modules of this "
                "process. Save its state_dict()"
            )
        kept = replace(
            replace(self._settings, run=None, mode="create", process_group=None),
            token=None,
            headers=None,
            ssl_context=None,
        )
        return self._copied(kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        memo[id(self)] = copied = type(self).__new__(type(self))
        kept = replace(self._settings, run=None, mode="create", attentions=deepcopy(self._settings.attentions, memo))
        state = self._copied(kept)
        copied.__setstate__({**deepcopy({**state, "settings": None}, memo), "settings": kept})
        return copied

    def _copied(self, given: Settings) -> dict[str, Any]:
        entries, _ = saved(self._home, tensors=True)
        return {"defaults": self._inherited, "param_groups": self.param_groups, "state": entries, "settings": given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = [
            {**{k: v for k, v in group.items() if k != "param_names"}, "params": with_names(group)}
            for group in state["param_groups"]
        ]
        self._begin(groups, state["defaults"], state["settings"])
        self._home.state.replace(state["state"])


def _presets_at(endpoint: Endpoint) -> Mapping[str, Any]:
    with Rest(endpoint) as rest:
        presets: Mapping[str, Any] = rest.capabilities()["presets"]
        return presets


def _alive(reference: weakref.ref[Optimizer]) -> Optimizer:
    optimizer = reference()
    assert optimizer is not None, "what asks belongs to it"
    return optimizer


def _together(gradients: Sequence[tuple[Slot, torch.Tensor]], most: int) -> Iterator[list[tuple[Slot, torch.Tensor]]]:
    together: list[tuple[Slot, torch.Tensor]] = []
    elements = 0
    for slot, gradient in gradients:
        together.append((slot, gradient))
        elements += gradient.numel()
        if elements >= most:
            yield together
            together, elements = [], 0
    if together:
        yield together


def _check_gradient(slot: Slot, gradient: torch.Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of '{slot.name}' is sparse ({gradient.layout}): muond takes dense ones (sparse=False)"
        )
