"""Gradients and updates in memory that is shared with the service: the bits of the socket, refusals, and lost connections."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from muond import MuondError, Parameter, open_run
from muond.run import Run
from muond.steps.parameter import Bound
from muond.steps.updates import Memory, Updates
from muond.transport.address import Addresses, addresses
from muond.transport.arenas import HostArenas, lay_out
from muond.transport.choice import Transport
from muond.wire.frame import check_frame
from service import Proxy, Service

GROUPS = [{"name": "muon", "algorithm": "muon", "lr": 0.02}, {"name": "adamw", "algorithm": "adamw", "lr": 0.01}]
Arrays = dict[str, npt.NDArray[np.float32]]
SHAPES = {"a": (24, 40), "b": (7,), "c": (300, 200)}


def arrays(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def opened(url: str, run: str, transport: str, *, dtype: str = "float32", **options: object) -> tuple[Run, Arrays]:
    weights = arrays(0)
    groups = {"a": "muon", "b": "adamw", "c": "adamw"}
    parameters = [
        Parameter(name, groups[name], array, gradient_dtype=dtype, update_dtype=dtype)
        for name, array in weights.items()
    ]
    return open_run(url, run=run, groups=GROUPS, parameters=parameters, transport=transport, **options), weights  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shared_memory_has_the_bits_of_the_socket(shared: Service, name: str, dtype: str) -> None:
    one, mine = opened(shared.url, name, "shm", dtype=dtype)
    two, sent = opened(shared.url, f"{name}-sent", "websocket", dtype=dtype)
    with one, two:
        assert (one.transport, two.transport) == ("shm", "websocket")
        for step in range(1, 4):
            assert one.step(arrays(step)).digest == two.step(arrays(step)).digest
            for key in SHAPES:
                np.testing.assert_array_equal(mine[key], sent[key])
        one.begin()
        for key in reversed(SHAPES):
            one.gradient(key, arrays(4)[key])
        assert one.end().digest == two.step(arrays(4)).digest
        skipping = {"a": arrays(5)["a"]}
        assert one.step(skipping, skipped=["b", "c"]).digest == two.step(skipping, skipped=["b", "c"]).digest


def test_a_lost_connection_sends_the_step_again_from_the_same_memory(
    durable: Callable[..., Service], proxy: Callable[..., Proxy], name: str
) -> None:
    service = durable("--durability", "journal")
    calm, kept = opened(service.url, f"{name}-calm", "websocket")
    one, mine = opened(service.url, name, "shm")
    with calm, one:
        for step in range(1, 5):
            digest = calm.step(arrays(step)).digest
            if step == 3:
                service.kill_and_restart()
            assert one.step(arrays(step)).digest == digest
            assert one.transport == "shm"
        for key in SHAPES:
            np.testing.assert_array_equal(mine[key], kept[key])


@pytest.mark.parametrize("beyond", [1, 60, 130, 260, 400, 700, 1500])
def test_a_cut_anywhere_changes_nothing(shared: Service, proxy: Callable[..., Proxy], name: str, beyond: int) -> None:
    calm, kept = opened(shared.url, f"{name}-calm", "shm")
    whole = proxy(shared.port)
    opened(whole.url, f"{name}-size", "shm")[0].close()
    # The first connection opens the run, and is cut so many bytes later.
    cutting = proxy(shared.port, [whole.relayed + bytes_ for bytes_ in (beyond, 200, 450, 900)])
    one, mine = opened(cutting.url, name, "shm", retries=20)
    with calm, one:
        for step in range(1, 7):
            assert one.step(arrays(step)).digest == calm.step(arrays(step)).digest
        assert one.transport == "shm"
    for key in SHAPES:
        np.testing.assert_array_equal(mine[key], kept[key])
    assert cutting.connections > 1


def test_a_step_goes_on_over_the_socket_where_the_memory_is_refused(
    shared: Service, proxy: Callable[..., Proxy], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, kept = opened(shared.url, f"{name}-calm", "websocket")
    cutting = proxy(shared.port)
    one, mine = opened(cutting.url, name, "auto")
    with calm, one:
        one.gradient("a", arrays(1)["a"])
        one.gradient("b", arrays(1)["b"])
        unmappable(monkeypatch, "nonce", bytes(32))
        cutting.cut()
        one.gradient("c", arrays(1)["c"])
        with pytest.warns(RuntimeWarning, match="does not begin with the nonce"):
            receipt = one.end()
        assert receipt.digest == calm.step(arrays(1)).digest
        assert one.transport == "websocket"
    for key in SHAPES:
        np.testing.assert_array_equal(mine[key], kept[key])


def test_a_gradient_that_is_not_finite_is_refused_by_name(shared: Service, name: str) -> None:
    one, _ = opened(shared.url, name, "shm")
    bad = arrays(1)
    bad["b"][3] = np.nan
    with one:
        with pytest.raises(MuondError) as caught:
            one.step(bad)
        assert (caught.value.code, caught.value.fields.refused) == ("GRADIENT_NOT_FINITE", ("b",))
        receipt = one.step(arrays(1))
        assert receipt.applied == 3


def test_row_scales_come_with_updates_in_shared_memory(shared: Service, name: str) -> None:
    digests = set()
    for transport in ("shm", "websocket"):
        weights = np.ones((8, 4), np.float32), np.ones((8, 4), np.float32)
        run = open_run(
            shared.url,
            run=f"{name}-{transport}",
            groups=[{"name": "g", "algorithm": "muonclip", "lr": 0.1}],
            parameters=[Parameter(n, "g", w) for n, w in zip("qk", weights, strict=True)],
            attentions=[
                {"name": "att", "query_heads": 2, "head_dim": 4, "query": {"parameter": 0}, "key": {"parameter": 1}}
            ],
            transport=transport,
        )
        with run:
            rng = np.random.default_rng(3)
            run.step([rng.standard_normal((8, 4)), rng.standard_normal((8, 4))], max_logits={"att": [400.0, 50.0]})
            digests.add((run.digest, weights[0].tobytes(), weights[1].tobytes()))
    assert len(digests) == 1


def test_a_name_that_there_is_not_and_a_gpu_that_there_is_not(shared: Service, name: str) -> None:
    with pytest.raises(
        ValueError, match="transport is 'pigeon', expected one of 'auto', 'cuda-ipc', 'shm', 'websocket'"
    ):
        opened(shared.url, name, "pigeon")
    with pytest.raises(ValueError, match="needs parameters on one CUDA device"):
        opened(shared.url, name, "cuda-ipc")


def test_auto_takes_shared_memory_on_loopback_only(shared: Service, name: str) -> None:
    one, _ = opened(shared.url, name, "auto")
    with one:
        assert one.transport == "shm"
    [local, remote] = addresses(["ws://localhost:1", "ws://192.0.2.1:1"]).endpoints
    nothing = Transport.choose("auto", Addresses((remote,)), ([4], [4]), None)
    assert nothing.agree(lambda offers: (None, {"type": "opened", **offers(remote)}))[1] == {"type": "opened"}  # type: ignore[arg-type, return-value]
    both = Transport.choose("auto", Addresses((remote, local)), ([4], [4]), None)
    offered = [both.agree(lambda offers, at=at: (None, {"type": "placed", **offers(at)}))[1] for at in (local, remote)]  # type: ignore[misc]
    both.close()
    assert ["transport" in answer for answer in offered] == [True, False]


def unmappable(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Arenas whose offer the service cannot take."""
    offer = HostArenas.offer
    monkeypatch.setattr(HostArenas, "offer", lambda self: {**offer(self), name: value})


def test_what_the_service_cannot_map_is_told_once_or_raised(
    shared: Service, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmappable(monkeypatch, "nonce", bytes(32))
    with pytest.warns(RuntimeWarning, match="shm: the memory that was mapped does not begin with the nonce"):
        one, _ = opened(shared.url, name, "auto")
    with one, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.transport == "websocket"
        one.step(arrays(1))
        one.reopen()
    with pytest.raises(MuondError, match="transport='shm' was not taken: shm: the memory that was mapped"):
        opened(shared.url, f"{name}-2", "shm")


def test_a_service_that_does_not_see_the_memory_is_not_believed(
    shared: Service, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostArenas, "proved", lambda _: False)
    with pytest.warns(RuntimeWarning, match="shm: the service does not see this process's memory"):
        one, _ = opened(shared.url, name, "auto", takeover=True)
    with one:
        assert one.transport == "websocket"
        one.step(arrays(1))


def test_a_system_without_memfd(shared: Service, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise OSError("no memfd here")

    monkeypatch.setattr("os.memfd_create", missing)
    one, _ = opened(shared.url, name, "auto")
    with one:
        assert one.transport == "websocket"
    with pytest.raises(ValueError, match="transport='shm' is not possible: no memfd here"):
        opened(shared.url, f"{name}-2", "shm")


def test_slots_begin_behind_the_proof_at_multiples_of_256() -> None:
    assert lay_out([1, 256, 257, 4]) == ([256, 512, 768, 1280], 1536)


def test_lists_of_updates_are_checked() -> None:
    lists: dict[str, list[float]] = {key: [] for key in ("parameters", "scale", "decay", "gradient_norm", "update_rms")}
    assert check_frame({"type": "updates", "step": 1, "replayed": False, **lists})
    with pytest.raises(MuondError, match=r"updates\.scale as int, expected list"):
        check_frame({"type": "updates", "step": 1, "replayed": False, **lists, "scale": 1})


@pytest.mark.parametrize(
    "change", [{"parameters": ["0"]}, {"parameters": [True]}, {"scale": [1]}, {"decay": []}, {"scale": [0.5, 0.5]}]
)
def test_updates_that_no_service_sends_end_the_connection(change: dict[str, list[object]]) -> None:
    updates = Updates([Bound(0, "w", (1,), "float32", "float32")], 1, Memory(), lambda _: None)
    frame = {"type": "updates", "step": 1, "parameters": [0], "scale": [0.5], "decay": [0.0], **change}
    arenas = HostArenas([4], [4])
    with pytest.raises(MuondError, match="lists are not of equally many integers and floats"):
        updates.take_shared(frame, arenas)
    arenas.close()


def test_large_gradients_leave_in_parts_over_the_socket(shared: Service, name: str) -> None:
    weights = [np.zeros((1100, 2000), np.float32) for _ in range(3)]
    parameters = [Parameter(f"p{i}", "sgd", array) for i, array in enumerate(weights)]
    groups = [{"name": "sgd", "algorithm": "sgd", "lr": 1.0}]
    with open_run(shared.url, run=name, groups=groups, parameters=parameters, transport="websocket") as run:
        run.step([np.full((1100, 2000), i, np.float32) for i in range(3)])
        run.close()
    assert [array[7, 3] for array in weights] == [0, -1, -2]


def test_nothing_leaks(shared: Service, name: str) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    # What tests before this one have left to the collector.
    gc.collect()
    before, threads = open_files(), set(threading.enumerate())
    for _ in range(20):
        one, _ = opened(shared.url, name, "shm", takeover=True)
        one.close()
    # The last mapping goes with the run, and a socket with the thread that reads it.
    del one
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    assert open_files() <= before
