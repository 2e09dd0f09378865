"""DiLoCo: many steps of an optimizer of one's own, then one step of an outer optimizer, which is a run of the service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch._compile import _disable_dynamo
from typing_extensions import Unpack

from ..declaration import Quorum
from ..error import ErrorFields, MuondError
from ..receipt import Receipt
from .names import plain_name
from .opening import Replica
from .optimizer import Optimizer
from .settings import Options

KEY = "diloco"
"""The key of a state_dict that has what is not the inner optimizer's."""

# These are of gradients of a backward pass, or of a model that the optimizer changes itself. The tensors of the outer one are copies,
# whose gradients are differences of weights.
_NO_OPTIONS = (
    "overlap",
    "accumulation_steps",
    "on_nonfinite",
    "layouts",
    "attentions",
    "max_logits",
    "keep",
    "keep_last",
)

ModelOrParams = torch.nn.Module | Iterable[tuple[str, torch.Tensor]]


class DiLoCo(torch.optim.Optimizer):
    """DiLoCo (Douillard et al., 2023, arXiv 2311.08105) around an optimizer of torch, in one replica or several.

    Every ``sync_every`` steps of ``inner_optimizer`` the outer one is fed with ``θ_ref - θ``, how far the weights have gone since the
    last synchronization, in place of a gradient: the service's ``sgd`` with Nesterov momentum. What it makes of ``θ_ref`` are then
    the weights, and the next ``θ_ref``.

    ``model_or_params``: a module, or its ``named_parameters()``; every parameter of the inner optimizer must be among them. ``lr``,
    ``momentum``, ``nesterov``: of the outer optimizer, the paper's unless a ``preset`` (``diloco``, ``muloco``) says otherwise. The
    other keywords are those of ``muond.torch.settings.Settings``; here gradients and updates travel as float32 unless asked otherwise
    (``int8_block256``, ``int4_block64`` for slow links, with error feedback).

    ``replica`` of ``replicas``: processes that train the same model on data of their own, with one name for the ``run``; the mean
    of their differences is taken. With ``min_replicas`` nobody waits for more than that for longer than ``deadline_seconds`` after
    the first: who is late has lost its round, and goes on with the weights of the others. Without, all wait for all. The weights
    must be the same everywhere when a run begins (a seed); one that comes later takes them from another's ``state_dict``
    (``rejoin``).

    ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's, so schedulers work with either of the two. ``outer`` is the
    outer one. Buffers of the model are nobody's here.
    """

    def __init__(
        self,
        model_or_params: ModelOrParams,
        inner_optimizer: torch.optim.Optimizer,
        sync_every: int = 30,
        *,
        lr: float | None = None,
        momentum: float | None = None,
        nesterov: bool | None = None,
        preset: str | None = None,
        replica: int = 0,
        replicas: int = 1,
        min_replicas: int | None = None,
        deadline_seconds: float = 60.0,
        **options: Unpack[Options],
    ) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every is {sync_every}, at least 1")
        for name in _NO_OPTIONS:
            if name in options:
                raise ValueError(
                    f"{name} is not possible: the outer optimizer has copies of the weights, and no backward pass"
                )
        self._ready = False
        self.inner = inner_optimizer
        self.sync_every = sync_every
        self.inner_steps = 0
        """Steps of the inner optimizer since the last synchronization."""
        self._awaited: Any = None
        """What the inner step has returned whose synchronization has failed."""
        self._is_undecided = False
        """Whether the service may have applied parts of a synchronization that has failed."""
        self._base = 0
        """The step of the run that ``θ_ref`` is of."""
        self._pairs = _pairs(model_or_params, inner_optimizer)
        # Hooks and schedulers are torch's own matter; the groups that it makes are not kept.
        super().__init__([parameter for _, parameter, _ in self._pairs], {})
        given = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        if replicas > 1:
            if options.get("run") is None:
                raise ValueError("replicas need run='a name', the same for all of them")
            options = {"mode": "create_or_resume", **options}
        self.outer = Optimizer(
            [_group(self._pairs, preset, {key: value for key, value in given.items() if value is not None})],
            **{"gradient_dtype": "float32", "update_dtype": "float32", **options, "on_nonfinite": "raise"},  # type: ignore[arg-type]
        )
        self._replica = _replica(replica, replicas, min_replicas, deadline_seconds)
        self.outer._home.replica = self._replica
        self._ready = True

    # Life

    def __enter__(self) -> DiLoCo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self, *, delete: bool = False) -> None:
        """Closes the connection of the outer optimizer; the run and its state stay in the service, unless ``delete``."""
        self.outer.close(delete=delete)

    @property
    def receipt(self) -> Receipt | None:
        """Of the last synchronization."""
        return self.outer.receipt

    # torch.optim.Optimizer: what the inner one has

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        # The constructor of torch.optim.Optimizer makes some of its own.
        if self._ready:
            self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._ready:
            self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if self._ready:
            self.inner.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._ready:
            raise ValueError(
                "a param_group cannot be added to DiLoCo, whose replicas have one set of parameters: make it anew around an inner "
                "optimizer that has them all"
            )

    # Steps

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step of the inner optimizer, and after every ``sync_every`` of them one of the outer. Returns what the inner has.

        Raises what either raises. A synchronization that raised (MuondError) is taken again by the next call, without another step of
        the inner optimizer; nothing is applied twice. Weights with NaN are not synchronized: see ``discard``. Of several replicas one
        whose weights are not those of the run's step is refused before its round: STEP_CONFLICT.
        """
        if self._replica is not None and self.inner_steps == 0:
            # Before a round: the others wait for whoever has the run open, and a round with other weights is lost.
            self._check_base(self._replica)
        if self.inner_steps < self.sync_every:
            self._awaited = self.inner.step(closure)
            self.inner_steps += 1
        if self.inner_steps == self.sync_every:
            self._synchronize()
        answer, self._awaited = self._awaited, None
        return answer

    @torch.no_grad()
    def _synchronize(self) -> None:
        for _, parameter, reference in self._pairs:
            # One that is there is of an attempt that failed, and parts of its step may be applied.
            if reference.grad is None:
                reference.grad = reference.to(parameter.dtype).to(reference.dtype) - parameter
        run = self.outer.open()
        before = run.step_count
        try:
            self.outer.step()
        except MuondError as error:
            if run.step_count == before:
                self._is_undecided = error.code != "GRADIENT_NOT_FINITE"
            else:
                # The service has taken the step without a parameter whose momentum would not be finite.
                self._begin_round()
            raise
        self._begin_round()

    def _check_base(self, own: Replica) -> None:
        run = self.outer.open()
        if run.step_count == self._base:
            return
        raise MuondError(
            "STEP_CONFLICT",
            f"run '{run.name}' is at step {run.step_count}, the weights of replica {own.replica} are "
            f"those of step {self._base}: load_state_dict(its own newest one), or rejoin(the state_dict of another replica)",
            ErrorFields(step=self._base, expected_step=run.step_count + 1),
        )

    def _begin_round(self) -> None:
        self._base = self.outer.step_count
        for _, parameter, reference in self._pairs:
            parameter.copy_(reference)
            reference.grad = None
        self.inner_steps = 0
        self._is_undecided = False

    @torch.no_grad()
    def discard(self) -> None:
        """Goes back to the last synchronization: the weights are ``θ_ref`` again. The inner optimizer's state stays as it is.

        Raises RuntimeError after a synchronization that failed on its way: the service may have applied parts of it.
        """
        if self._is_undecided:
            raise RuntimeError("a synchronization has failed on its way to the service: take it with step()")
        self._begin_round()

    # State

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and under ``diloco`` ``θ_ref``, the count of inner steps and the outer's. Raises MuondError.

        Of several replicas the outer optimizer's state is the service's to keep: the dictionary says of which step it is.
        """
        if self.inner_steps == self.sync_every:
            raise RuntimeError("a synchronization has failed: take it with step() before the state is looked at")
        own = {
            "inner_steps": self.inner_steps,
            "reference": {name: reference.detach().clone() for name, _, reference in self._pairs},
            **({"outer": self.outer.state_dict()} if self._replica is None else self._shared_state()),
        }
        return {**self.inner.state_dict(), KEY: own}

    def _shared_state(self) -> dict[str, Any]:
        run = self.outer.open()
        feedback = self.outer._feedback
        lost = {} if feedback is None else feedback.copied(reference for _, _, reference in self._pairs)
        named = {name: lost[reference] for name, _, reference in self._pairs if reference in lost}
        return {"step": run.step_count, "digest": run.digest, "error_feedback": named}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a state; the model's weights of it are the caller's to load. Raises ValueError, MuondError.

        Of several replicas: this replica's own state, of the step that the run is at.
        """
        given = dict(state_dict)
        own = self._taken_apart(given)
        if not 0 <= own["inner_steps"] < self.sync_every:
            raise ValueError(
                f"the state dict is of {own['inner_steps']} inner steps after a synchronization, sync_every is {self.sync_every}"
            )
        if self._replica is None:
            self.outer.load_state_dict(own["outer"])
        else:
            self._check_step(own)
        self.inner.load_state_dict(given)
        self._take_reference(own)
        self.inner_steps = own["inner_steps"]
        if self._replica is not None and self.outer._feedback is not None:
            lost = own["error_feedback"]
            self.outer._feedback.set({reference: lost[name] for name, _, reference in self._pairs if name in lost})

    @_disable_dynamo
    @torch.no_grad()
    def rejoin(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the weights of another replica's ``state_dict``, of the step that the run is at, and begins a round with them.

        Weights and ``θ_ref`` are the other's ``θ_ref``; the inner optimizer's state stays as it is. Raises ValueError; MuondError
        STEP_CONFLICT where the run is at another step.
        """
        own = self._taken_apart(dict(state_dict))
        self._check_step(own)
        self._take_reference(own)
        self._begin_round()

    def _taken_apart(self, given: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] | None = given.pop(KEY, None)
        if own is None:
            raise ValueError(
                f"the state dict has no '{KEY}': it is that of another optimizer. One of the inner optimizer is loaded into that, "
                "before DiLoCo is made around it"
            )
        wanted = "outer" if self._replica is None else "step"
        if wanted not in own:
            kinds = ("one replica", "several")
            theirs, ours = kinds if self._replica is not None else kinds[::-1]
            raise ValueError(f"the state dict is of {theirs}, here is {ours}")
        self._check_reference(own["reference"])
        return own

    def _check_step(self, own: Mapping[str, Any]) -> None:
        run = self.outer.open()
        if (run.step_count, run.digest) == (own["step"], own["digest"]):
            return
        raise MuondError(
            "STEP_CONFLICT",
            f"the state dict is of step {own['step']} with digest {own['digest']}, run '{run.name}' is at step {run.step_count} with "
            f"{run.digest}: take the newest state_dict of a replica",
            ErrorFields(step=own["step"], expected_step=run.step_count + 1),
        )

    @torch.no_grad()
    def _take_reference(self, own: Mapping[str, Any]) -> None:
        for name, _, reference in self._pairs:
            reference.copy_(own["reference"][name])
            reference.grad = None
        self._is_undecided = False
        self._base = self.outer.step_count

    def _check_reference(self, saved: Mapping[str, torch.Tensor]) -> None:
        shapes = {name: list(reference.shape) for name, _, reference in self._pairs}
        given = {name: list(tensor.shape) for name, tensor in saved.items()}
        different = [name for name in {**shapes, **given} if shapes.get(name) != given.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"parameter '{name}' has shape {given.get(name)} in the state dict and {shapes.get(name)} here (None: there is none)"
            )

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "DiLoCo cannot be copied or pickled, as its outer optimizer is one run of a service: use state_dict()"
        )


Pair = tuple[str, torch.Tensor, torch.Tensor]
"""A parameter's name, the parameter, and θ_ref."""


def _pairs(model_or_params: ModelOrParams, inner: torch.optim.Optimizer) -> list[Pair]:
    given = model_or_params.named_parameters() if isinstance(model_or_params, torch.nn.Module) else model_or_params
    names: dict[torch.Tensor, str] = {}
    for entry in given:
        if not isinstance(entry, tuple):
            raise TypeError(f"DiLoCo needs a module or its named_parameters(), this one is a {type(entry).__name__}")
        names[entry[1]] = plain_name(entry[0])
    listed = [parameter for group in inner.param_groups for parameter in group["params"]]
    unknown = next((parameter for parameter in listed if parameter not in names), None)
    if unknown is not None:
        raise ValueError(
            f"the inner optimizer has a parameter of shape {list(unknown.shape)} that the model does not have: no round would "
            "synchronize it"
        )
    return [(names[parameter], parameter, _reference(parameter)) for parameter in dict.fromkeys(listed)]


def _reference(parameter: torch.Tensor) -> torch.Tensor:
    """A copy in float32 or wider: what is added to it over many rounds must not be rounded away."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(wide, copy=True).requires_grad_()


def _group(pairs: list[Pair], preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    values = {"lr": 0.7, "momentum": 0.9, "nesterov": True} if preset is None else {"preset": preset}
    params = [(name, reference) for name, _, reference in pairs]
    return {"params": params, "name": "outer", "algorithm": "sgd", **values, **given}


def _replica(replica: int, replicas: int, min_replicas: int | None, deadline_seconds: float) -> Replica | None:
    if not 0 <= replica < replicas:
        raise ValueError(f"replica is {replica}, expected 0 to {replicas - 1}: there are {replicas} replicas")
    if replicas == 1:
        if min_replicas is not None:
            raise ValueError(
                f"min_replicas is {min_replicas}, and there is one replica: say how many replicas there are"
            )
        return None
    return Replica(replica, replicas, None if min_replicas is None else Quorum(min_replicas, deadline_seconds))
