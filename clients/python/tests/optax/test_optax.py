"""The transformation of optax against optax's own, under jit."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

# Before JAX is imported: what is refused on several devices needs several.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import muond.optax
from muond import MuondError
from service import Service

Tree = dict[str, dict[str, jax.Array]]

INPUTS = jax.random.normal(jax.random.key(1), (64, 6))
TARGETS = jax.random.normal(jax.random.key(2), (64, 3))


def model() -> Tree:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (6, 16)) / 3, "bias": jnp.zeros(16)},
        "second": {"kernel": jax.random.normal(keys[1], (16, 3)) / 4, "bias": jnp.zeros(3)},
    }


def loss_of(params: Tree) -> jax.Array:
    hidden = jnp.tanh(INPUTS @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["second"]["kernel"] + params["second"]["bias"] - TARGETS) ** 2)


def train(optimizer: optax.GradientTransformation, steps: int = 20) -> tuple[Tree, list[float]]:
    params = model()
    state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, state: optax.OptState) -> tuple[Tree, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    return params, losses


def assert_close(ours: Tree, theirs: Tree) -> None:
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-4, atol=2e-5)


def by_rank(_name: str, leaf: jax.ShapeDtypeStruct) -> str:
    return "matrices" if len(leaf.shape) == 2 else "rest"


def test_adamw_is_that_of_optax(shared: Service, name: str) -> None:
    schedule = optax.cosine_decay_schedule(0.02, 30)
    groups = [{"name": "all", "algorithm": "adamw", "lr": 0.5, "weight_decay": 0.1}]
    ours = muond.optax.service(shared.url, run=name, groups=groups, learning_rates={"all": schedule})
    params, losses = train(ours)
    expected, reference = train(optax.adamw(schedule, weight_decay=0.1))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, reference, rtol=1e-4)
    assert_close(params, expected)
    assert ours.run.step_count == 20
    assert ours.receipt is not None
    assert ours.receipt.step == 20
    assert [parameter.name for parameter in ours.run.parameters] == [
        "first.bias",
        "first.kernel",
        "second.bias",
        "second.kernel",
    ]
    ours.close()


def test_muon_is_that_of_optax(shared: Service, name: str) -> None:
    groups = [
        {"name": "matrices", "algorithm": "muon", "lr": 0.02, "weight_decay": 0.1, "nesterov": False},
        {"name": "rest", "algorithm": "adamw", "lr": 0.02, "weight_decay": 0.0},
    ]
    ours = muond.optax.service(shared.url, run=name, groups=groups, group_of=by_rank)
    params, losses = train(ours)
    theirs = optax.contrib.muon(0.02, weight_decay=0.1, nesterov=False, adam_weight_decay=0.0)
    expected, reference = train(theirs)
    np.testing.assert_allclose(losses, reference, rtol=2e-4)
    assert_close(params, expected)
    ours.close()


def test_it_is_one_of_a_chain_and_of_a_scan(shared: Service, name: str) -> None:
    groups = [{"name": "all", "algorithm": "sgd", "lr": 0.1}]
    ours = muond.optax.service(shared.url, run=name, groups=groups)
    chain = optax.chain(optax.clip_by_global_norm(0.5), ours)
    expected, _ = train(optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)), 5)
    params = model()

    def step(carry: tuple[Tree, optax.OptState], _: None) -> tuple[tuple[Tree, optax.OptState], None]:
        params, state = carry
        updates, state = chain.update(jax.grad(loss_of)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 5))((params, chain.init(params)))
    assert_close(params, expected)
    assert ours.run.step_count == 5
    ours.close()


def test_the_program_of_the_readme_runs(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUOND_URL", shared.url)
    text = (Path(__file__).parents[2] / "README.md").read_text()
    [program] = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    names: dict[str, muond.optax.Service] = {}
    exec(program, names)
    receipt = names["optimizer"].receipt
    assert receipt is not None
    assert receipt.step == 20


def test_other_dtypes_keep_theirs(shared: Service, name: str) -> None:
    ours = muond.optax.service(shared.url, run=name, groups=[{"name": "all", "algorithm": "sgd", "lr": 0.5}])
    params = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16), "scalar": jnp.asarray(3.0)}
    state = ours.init(params)
    updates, _ = ours.update(params, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(updates["w"], np.float32), [-0.5, -1.0])
    assert float(updates["scalar"]) == -1.5
    ours.close()


def test_a_failed_step_raises_and_init_finds_where_the_run_is(shared: Service, name: str) -> None:
    ours = muond.optax.service(shared.url, run=name, groups=[{"name": "all", "algorithm": "sgd", "lr": 0.5}])
    params = {"w": jnp.ones(2)}
    state = ours.init(params)
    update = jax.jit(ours.update)
    with pytest.raises(Exception, match="GRADIENT_NOT_FINITE"):
        jax.block_until_ready(update({"w": jnp.asarray([1.0, jnp.nan])}, state, params))
    state = ours.init(params)
    assert int(state.step) == 0
    updates, later = update({"w": jnp.ones(2)}, state, params)
    np.testing.assert_array_equal(np.asarray(updates["w"]), [-0.5, -0.5])
    assert int(later.step) == 1
    with pytest.raises(Exception, match=r"the state is of step 0, run '.*' is at step 1"):
        jax.block_until_ready(update({"w": jnp.ones(2)}, state, params))
    assert int(ours.init(params).step) == 1
    ours.close()


def test_what_it_does_not_do_is_refused(shared: Service, name: str) -> None:
    groups = [{"name": "matrices", "algorithm": "muon"}, {"name": "rest", "algorithm": "sgd"}]
    service: Callable[..., muond.optax.Service] = muond.optax.service
    with pytest.raises(ValueError, match="2 groups: say with group_of"):
        service(shared.url, run=name, groups=groups)
    ours = service(shared.url, run=name, groups=groups, group_of=by_rank)
    with pytest.raises(RuntimeError, match="call init"):
        _ = ours.run
    with pytest.raises(ValueError, match="'w' is int32, expected floats"):
        ours.init({"w": jnp.ones(2, jnp.int32)})
    wrong = service(shared.url, run=name, groups=groups, group_of=lambda *_: "none")
    with pytest.raises(ValueError, match="in group 'none', there are matrices, rest"):
        wrong.init(model())
    muon = service(shared.url, run=name, groups=groups, group_of=lambda *_: "matrices")
    with pytest.raises(ValueError, match=r"'first.bias' has shape \[16\]: Muon's have two dimensions"):
        muon.init(model())
    mesh = NamedSharding(Mesh(np.array(jax.devices()), "d"), PartitionSpec("d"))
    with pytest.raises(ValueError, match="'w' lies on 2 devices"):
        ours.init({"w": jax.device_put(jnp.ones(4), mesh)})
    with pytest.raises(ValueError, match="'w' lies on 2 devices"):
        ours.update({"w": jax.device_put(jnp.ones(4), mesh)}, muond.optax.ServiceState(jnp.asarray(0)), {})
    with pytest.raises(MuondError, match="RUN_NOT_FOUND"):
        service(shared.url, run=name, groups=groups, group_of=by_rank, mode="resume").init(model())
    params = {"w": jnp.ones(2)}
    state = ours.init(params)
    with pytest.raises(ValueError, match="update needs params"):
        ours.update(params, state)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (params, state))
    with pytest.raises(Exception, match=r"(?i)ordered|IO effect"):
        jax.vmap(lambda tree: ours.update(tree[0], tree[1], tree[0]))(many)
    with pytest.raises(ValueError, match="a mesh of 2 devices"):
        jax.pmap(lambda tree: ours.update(tree[0], tree[1], tree[0]))(many)
    assert ours.run.step_count == 0
    ours.close()
