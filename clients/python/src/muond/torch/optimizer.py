"""A torch optimizer whose state lives in a service."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch
from typing_extensions import Unpack

from ..connection import Connection
from ..error import ErrorFields, MuondError
from ..receipt import Checkpoint, Receipt
from ..rest import Rest
from ..run import Run
from ..steps.interrupt import interrupt_later
from ..transport.address import endpoint
from .grouping import complete_group, resolve_groups
from .hyperparameters import changes
from .kept import Kept
from .opening import new_run_name, open_slots
from .progress import Progress
from .restoring import bring_to, go_back, is_at
from .settings import Options, Settings, settings
from .slots import Slot, group_names, make_slots
from .staging import Staging
from .state import TOKEN, read_state
from .streaming import Streaming

Params = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]


class Optimizer(torch.optim.Optimizer):
    """Any algorithm of the service, one for each group; all groups are one run.

    ``params``: ``model.named_parameters()`` with ``groups=`` (maps of ``parameters``: names or patterns, ``algorithm``,
    ``name`` and hyperparameters, or ``muond.torch.suggest(model)``), or param_groups of torch with an ``algorithm`` each.
    The other keywords are those of ``muond.torch.settings.Settings``.

    The run is opened with the first step (or by ``open()``), so that parameters can be moved and groups added before it.
    Raises MuondError if there is no service or the key is wrong, ValueError and TypeError for what no run can have.
    """

    def __init__(
        self, params: Params, groups: Sequence[Mapping[str, Any]] | None = None, **options: Unpack[Options]
    ) -> None:
        self._begin(resolve_groups(params, groups), {}, settings(options))

    def _begin(self, params: Any, defaults: dict[str, Any], given: Settings) -> None:
        self._settings = given
        self._address = endpoint(given.url, token=given.token, headers=given.headers, ssl_context=given.ssl_context)
        self._run: Run | None = None
        self._run_name = given.run or new_run_name()
        self._closed = False
        self._slots: list[Slot] = []
        self._staging = Staging()
        self._streaming: Streaming | None = None
        self._opening = threading.RLock()
        self._kept: list[Kept] = []
        self._begun_with: dict[str, dict[str, Any]] = {}
        self._progress = Progress(self._run_name) if given.progress else None
        self.receipt: Receipt | None = None
        """Of the last finished step."""
        super().__init__(params, defaults)
        # What is wrong with a parameter, the address or the key should be heard of here, not after the first backward pass.
        make_slots(self.param_groups, given)
        Connection(self._address).close(MuondError("CLIENT_CLOSED", "the service was only looked for"))
        if given.overlap:
            self._attach()

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
        return self._run_name

    @property
    def step_count(self) -> int:
        """The last finished step of the run, 0 before it is open."""
        return 0 if self._run is None else self._run.step_count

    def open(self) -> Run:
        """Opens the run, which the first step does by itself. Raises MuondError RUN_EXISTS, RUN_MISMATCH, OVER_CAPACITY…"""
        with self._opening:
            if self._closed:
                raise MuondError("CLIENT_CLOSED", f"the optimizer of run '{self._run_name}' was closed")
            if self._run is None:
                self._run = self._open(self._settings.mode, self._settings.checkpoint)
                self._settle(self._run)
            return self._run

    def close(self, *, delete: bool = False) -> None:
        """Closes the connection; the run and its state stay in the service, unless ``delete``."""
        if self._streaming is not None:
            self._streaming.detach()
        if self._progress is not None:
            self._progress.close()
        was_open = self._run is not None and not self._closed
        self._closed = True
        if self._run is not None:
            self._run.close()
        if delete and was_open:
            with Rest(self._address) as rest:
                rest.delete(self._run_name)

    def _open(self, mode: str, checkpoint: str | None = None) -> Run:
        self._slots = make_slots(self.param_groups, self._settings)
        return open_slots(
            self._run_name,
            self._slots,
            self.param_groups,
            self._address,
            self._settings,
            mode=mode,
            checkpoint=checkpoint,
        )

    def _settle(self, run: Run) -> None:
        names = run.settle()
        if not names:
            return
        warnings.warn(
            f"run '{run.name}' was left in the middle of step {run.step_count}: the momentum of {len(names)} parameters has its "
            f"gradients, no weight has their updates ({', '.join(names[:3])}{'…' if len(names) > 3 else ''}). "
            "For an exact state go back to a checkpoint.",
            stacklevel=4,
        )

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_run", None) is not None:
            raise ValueError(
                f"run '{self._run_name}' is open, and its parameters are fixed: list them all at first (frozen ones may be among them)"
            )
        super().add_param_group(complete_group(param_group, self.defaults))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._give_up_half_step()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step: returns the receipt, or with a closure what the closure returned (``receipt`` has the other).

        Raises MuondError. A step that raised can be taken again, as long as the gradients are the same; nothing is applied twice.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        receipt = self._take_step()
        return receipt if closure is None else loss

    def _take_step(self) -> Receipt:
        run = self.open()
        self._check_gradients()
        if run.in_flight:
            self._check_unchanged(run)
        else:
            self._begin_step(run)
        try:
            # Ctrl-C waits until the step is finished, or the next one could not begin.
            with interrupt_later(run.hurry):
                return self._took(self._send_and_end(run))
        finally:
            if self._streaming is not None:
                self._streaming.reset()
                self._streaming.attach()

    def _send_and_end(self, run: Run) -> Receipt:
        skipped: list[int] = []
        for slot in self._slots:
            gradient = slot.tensor.grad
            if run.has_gradient(slot.index):
                continue
            if gradient is None:
                skipped.append(slot.index)
            else:
                data, ready = self._staging.put(slot, gradient, borrow=True)
                run.gradient_bytes(slot.index, data, ready)
        return run.end(skipped=skipped)

    def _took(self, receipt: Receipt) -> Receipt:
        self.receipt = receipt
        if self._settings.max_logits is not None:
            self._settings.max_logits.reset()
        if self._progress is not None:
            self._progress.show(receipt)
        if self._settings.callback is not None:
            self._settings.callback(receipt)
        if receipt.refused and self._settings.nonfinite == "raise":
            first = receipt.refused[0]
            names = tuple(self._slots[error.fields.parameter or 0].name for error in receipt.refused)
            message = f"{first.message}; step {receipt.step} was ended without {', '.join(names)}"
            raise MuondError(first.code, message, ErrorFields(step=receipt.step, refused=names), status=first.status)
        return receipt

    def _begin_step(self, run: Run) -> None:
        maximize = {bool(group.get("maximize")) for group in self.param_groups}
        if len(maximize) > 1:
            raise ValueError(
                "maximize is True for some groups and False for others: gradient_scale is one for the whole step"
            )
        max_logits = self._settings.max_logits
        self._begun_with = self._changed_groups(run)
        run.begin(
            groups=self._begun_with or None,
            gradient_scale=-1.0 if True in maximize else None,
            max_logits=(max_logits.values() or None) if max_logits is not None else None,
            skip_refused=True,
        )

    def _changed_groups(self, run: Run) -> dict[str, dict[str, Any]]:
        pairs = zip(group_names(self.param_groups), self.param_groups, strict=True)
        changed = {name: changes(group, run.groups[name]) for name, group in pairs}
        return {name: values for name, values in changed.items() if values}

    def _check_gradients(self) -> None:
        """Before anything is sent: a step is not begun that cannot be ended."""
        for slot in self._slots:
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
            make_slots(self.param_groups, self._settings), self._settings.accumulation_steps, send
        )
        self._streaming.attach()
        weakref.finalize(self, self._streaming.detach)

    def _stream(self, slot: Slot, gradient: torch.Tensor) -> None:
        with torch.no_grad():
            run = self.open()
            _check_gradient(slot, gradient)
            if not run.in_flight:
                self._begin_step(run)
            data, ready = self._staging.put(slot, gradient, borrow=False)
            run.gradient_bytes(slot.index, data, ready)

    def _check_unchanged(self, run: Run) -> None:
        """What was sent during the backward pass is what the trainer still wants, or the step must not be taken."""
        names = [] if self._streaming is None else self._streaming.changed()
        if names:
            raise RuntimeError(
                f"the gradient of '{names[0]}' was changed after overlap=True had sent it ({len(names)} in all): "
                "gradient clipping, GradScaler and whatever else changes gradients between backward() and step() need overlap=False"
            )
        wanted = self._changed_groups(run)
        if wanted != self._begun_with:
            raise RuntimeError(
                f"hyperparameters were changed after overlap=True had begun to send step {run.step_count + 1}: "
                f"it began with {self._begun_with}, now it would be {wanted}; change them before backward()"
            )

    def _give_up_half_step(self) -> None:
        """Ends a step whose backward pass failed with some gradients sent: those parameters take it, the others do not."""
        run, streaming = self._run, self._streaming
        if streaming is None:
            return
        # What was counted of an accumulation goes with its gradients.
        streaming.reset()
        if run is None or run.closed or not run.in_flight:
            return
        skipped = [slot.index for slot in self._slots if not run.has_gradient(slot.index)]
        self.receipt = run.end(skipped=skipped)
        warnings.warn(
            f"step {self.receipt.step} was left with {len(self._slots) - len(skipped)} of {len(self._slots)} gradients sent, "
            "and was ended with those",
            stacklevel=3,
        )

    # State

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, complete in itself: param_groups, and the state read from the service, in host memory.

        With ``state="checkpoint"`` the service keeps the state, and the dictionary the checkpoint's id. Raises MuondError.
        """
        answer: dict[str, Any] = super().state_dict()
        run = self._run
        if run is None:
            return answer
        if run.in_flight:
            raise RuntimeError(
                f"step {run.step_count + 1} of run '{run.name}' is under way: take it before its state is saved"
            )
        token: dict[str, Any] = {"version": 1, "run": run.name, "step": run.step_count, "digest": run.digest}
        if self._settings.state == "checkpoint":  # pragma: no cover - until the service has checkpoints
            token["checkpoint"] = self.checkpoint().id
        else:
            with Rest(self._address) as rest:
                answer["state"] = read_state(rest, run.name, self._slots)
        answer[TOKEN] = token
        return answer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the step of a state_dict, from this package or from the torch optimizer of the same name.

        If the run is where the dictionary left it, nothing is sent. Else the service goes back to the dictionary's checkpoint, or
        takes its tensors. Raises MuondError; ValueError if the groups differ.
        """
        ours = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        saved = state_dict["param_groups"]
        if len(saved) != len(ours):
            raise ValueError(f"the state_dict has {len(saved)} param_groups, this optimizer has {len(ours)}")
        groups = [{**own, **group} for own, group in zip(ours, saved, strict=True)]
        super().load_state_dict({"state": {}, "param_groups": groups})
        token = state_dict.get(TOKEN)
        if token is not None or state_dict["state"]:
            self._restore(token or {}, state_dict["state"])

    def _restore(self, token: Mapping[str, Any], state: Mapping[int, Mapping[str, Any]]) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None
        if self._settings.run is None and "run" in token:
            self._run_name = token["run"]
        # The settings' mode is for a run without a history; the service may know the run of a state_dict or not.
        run = self._open("create_or_resume")
        if not is_at(run, token.get("step"), token.get("digest")):  # pragma: no cover - see bring_to
            bring_to(run, token, state, self._slots, self.param_groups)
        self._run = run
        if self._progress is not None:
            self._progress.start(run.step_count)

    # Checkpoints

    def checkpoint(self, tag: str | None = None) -> Checkpoint:  # pragma: no cover - until the service has checkpoints
        """Has the service keep its state of this step; with ``keep="cpu"`` the weights are kept here. Raises MuondError."""
        checkpoint = self.open().checkpoint(tag)
        if self._settings.keep == "cpu":
            self._kept = [*self._kept, Kept(checkpoint, self._slots, self.param_groups)][-self._settings.keep_last :]
        return checkpoint

    def rollback(self) -> int:  # pragma: no cover - until the service has checkpoints
        """Goes back to the last step for which the service has the state and this process the weights (``keep="cpu"``).

        Weights and param_groups are those of that step afterwards; schedulers and data are the caller's. Returns the step.
        Raises MuondError.
        """
        run = self.open()
        kept = go_back(run, self._kept)
        if self._streaming is not None:
            self._streaming.reset()
        kept.restore(self._slots, self.param_groups)
        return run.step_count

    # What an optimizer with a connection cannot do

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} of run '{self._run_name}' cannot be copied or pickled: it holds a connection. Save its state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.__getstate__()


def _check_gradient(slot: Slot, gradient: torch.Tensor) -> None:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of '{slot.name}' is sparse ({gradient.layout}): muond takes dense ones (sparse=False)"
        )
    if tuple(gradient.shape) != slot.shape:
        raise RuntimeError(
            f"the gradient of '{slot.name}' has shape {list(gradient.shape)}, the run has {list(slot.shape)}"
        )
