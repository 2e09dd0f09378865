"""A gradient transformation of optax whose update is computed by the service, under ``jax.jit``.

    optimizer = muond.optax.service("ws://127.0.0.1:8787", run="first", groups=[{"name": "all", "algorithm": "adamw", "lr": 1e-3}])
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)  # in a jitted function
    params = optax.apply_updates(params, updates)

The state of the optimizer lies in the service; here it is a counter of steps. Each update is a callback to the host, ordered
after the one before (``jax.experimental.io_callback``). Gradients and updates travel as float32.

It is for one device of one process: ``jax.pmap``, ``jax.vmap``, ``jax.shard_map`` and parameters on several devices are refused.
QK-clip is not there either, as an update of optax is added to the weights and cannot scale rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax.experimental import io_callback

from .declaration import Parameter
from .receipt import Receipt
from .run import Run, open_run
from .steps.updates import Update

Groups = Sequence[Mapping[str, Any]]
GroupOf = Callable[[str, jax.ShapeDtypeStruct], str]
"""The name of the group of a parameter, by its name and its shape and dtype."""

_MUON = ("muon", "muonclip")


class ServiceState(NamedTuple):
    """Counts the steps; all else lies in the service."""

    step: jax.Array
    """The last finished step, a scalar int32."""


class Service(optax.GradientTransformation):  # type: ignore[misc]
    """What ``service`` returns: ``init`` and ``update``, and the run behind them."""

    _home: _Home

    @property
    def run(self) -> Run:
        """The run, once ``init`` has opened it. Raises RuntimeError before."""
        return self._home.run

    @property
    def receipt(self) -> Receipt | None:
        """Of the last step; ``jax.effects_barrier()`` waits for steps that were dispatched."""
        return self._home.receipt

    def close(self) -> None:
        """Closes the connection; the run stays in the service."""
        self._home.close()


def service(
    url: str | Sequence[str] | None = None,
    *,
    run: str,
    groups: Groups,
    group_of: GroupOf | None = None,
    learning_rates: Mapping[str, optax.Schedule] | None = None,
    **options: Any,
) -> Service:
    """A gradient transformation whose steps are those of a run of the service.

    ``groups``: maps of ``name``, ``algorithm`` or ``preset``, and hyperparameters. ``group_of`` says which parameter is in which; it
    may be left out where there is one. A parameter is named by its path in the pytree, with dots: ``params.Dense_0.kernel``.
    ``learning_rates``: {group: schedule}, called with the number of steps before, as optax calls it. ``options`` are those of
    ``muond.open_run``, say ``token``, ``mode`` or ``takeover``.

    A parameter of two dimensions in a group of Muon travels transposed: JAX has (inputs, outputs) where torch, and with it the
    service, has (outputs, inputs), and Muon's factor depends on which is which. One of more dimensions is refused there.

    ``init`` opens the run, and raises MuondError as ``open_run`` does, and ValueError for parameters that are no floats, lie on
    several devices, or fit no group. ``update`` needs ``params``. A step that fails raises in JAX's own way, with the text of the
    MuondError; nothing of it is applied on this side, and ``init`` finds where the run is.
    """
    if group_of is None and len(groups) != 1:
        raise ValueError(f"there are {len(groups)} groups: say with group_of which parameter is in which")
    home = _Home(
        url, {"run": run, "groups": groups, **options}, group_of or (lambda _name, _leaf: str(groups[0]["name"]))
    )
    rates = dict(learning_rates or {})

    def init(params: optax.Params) -> ServiceState:
        return ServiceState(jnp.asarray(home.open(params), jnp.int32))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("update needs params: a step shrinks the weights, too")
        refuse_devices(updates)
        gradients, tree = jax.tree.flatten(updates)
        lr = {name: schedule(state.step) for name, schedule in rates.items()}
        shapes = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in gradients]
        factors = jax.ShapeDtypeStruct((len(shapes),), jnp.float32)
        floats = [leaf.astype(jnp.float32) for leaf in gradients]
        data, scale, decay = io_callback(home.step, (shapes, factors, factors), state.step, lr, floats, ordered=True)
        moved = [
            (scale[i] * each - decay[i] * weights.astype(jnp.float32)).astype(weights.dtype)
            for i, (each, weights) in enumerate(zip(data, jax.tree.leaves(params), strict=True))
        ]
        return jax.tree.unflatten(tree, moved), ServiceState(state.step + 1)

    transformation = Service(init, update)
    transformation._home = home
    return transformation


def refuse_devices(tree: Any) -> None:
    """Raises ValueError for leaves on several devices, and inside ``jax.pmap`` and ``jax.shard_map``: each would take the step."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        raise ValueError(
            f"this runs over a mesh of {mesh.size} devices (jax.pmap, jax.shard_map), muond.optax takes one device"
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            continue
        devices = len(leaf.sharding.device_set)
        if devices > 1:
            raise ValueError(f"'{_name_of(path)}' lies on {devices} devices, muond.optax takes one device")


def _name_of(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


class _Home:
    """The run of a transformation, and what it says of the step in progress."""

    def __init__(self, url: str | Sequence[str] | None, options: dict[str, Any], group_of: GroupOf) -> None:
        self._url = url
        self._options = options
        self._group_of = group_of
        algorithms = {
            str(group["name"]): str(group.get("algorithm", group.get("preset"))) for group in options["groups"]
        }
        self._algorithms: Mapping[str, str] = algorithms
        self._run: Run | None = None
        self._declared: list[Parameter] = []
        self._transposed: list[bool] = []
        self._updates: dict[int, tuple[npt.NDArray[np.float32], float, float]] = {}
        self.receipt: Receipt | None = None

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("the run is not open: call init with the parameters first")
        return self._run

    def open(self, params: optax.Params) -> int:
        """Opens the run, or finds it open; returns its last finished step."""
        if jax.process_count() > 1:  # pragma: no cover - a test has one process
            raise ValueError(f"there are {jax.process_count()} processes of JAX, muond.optax takes one")
        refuse_devices(params)
        paths, _ = jax.tree_util.tree_flatten_with_path(params)
        declared = [self._declare(_name_of(path), leaf) for path, leaf in paths]
        if self._run is not None and declared == self._declared:
            self._run.reopen()
            return self._run.step_count
        self.close()
        self._declared = declared
        self._transposed = [self._algorithms[one.group] in _MUON for one in declared]
        self._run = open_run(self._url, parameters=declared, apply=self._keep, **self._options)
        return self._run.step_count

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def _declare(self, name: str, leaf: Any) -> Parameter:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"parameter '{name}' is {leaf.dtype}, expected floats")
        group = self._group_of(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        if group not in self._algorithms:
            raise ValueError(f"parameter '{name}' is in group '{group}', there are {', '.join(self._algorithms)}")
        if self._algorithms[group] not in _MUON:
            return Parameter(name, group, shape=leaf.shape)
        if leaf.ndim != 2:
            raise ValueError(
                f"parameter '{name}' has shape {list(leaf.shape)}: Muon's have two dimensions here, give it another group"
            )
        return Parameter(name, group, shape=leaf.shape[::-1])

    def step(
        self, count: npt.ArrayLike, rates: Mapping[str, npt.ArrayLike], gradients: Sequence[npt.ArrayLike]
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The callback: takes a step, and returns each update with its scale and its decay."""
        run = self.run
        if run.step_count != int(np.asarray(count)):
            raise RuntimeError(
                f"the state is of step {int(np.asarray(count))}, run '{run.name}' is at step {run.step_count}"
            )
        self._updates = {}
        arrays = [np.asarray(gradient) for gradient in gradients]
        sent = [array.T if transposed else array for array, transposed in zip(arrays, self._transposed, strict=True)]
        groups = {name: {"lr": float(np.asarray(value))} for name, value in rates.items()}
        self.receipt = run.step(
            [np.ascontiguousarray(array).reshape(array.shape) for array in sent], groups=groups or None
        )
        taken = [self._updates[index] for index in range(len(sent))]
        data = [
            each.T if transposed else each for (each, _, _), transposed in zip(taken, self._transposed, strict=True)
        ]
        scale, decay = (np.array([each[i] for each in taken], np.float32) for i in (1, 2))
        return data, scale, decay

    def _keep(self, updates: Sequence[Update]) -> None:
        for update in updates:
            index = update.parameter.index
            values = np.frombuffer(update.data, np.float32).reshape(self._declared[index].declaration()["shape"])
            self._updates[index] = (values.copy(), update.scale, update.decay)
