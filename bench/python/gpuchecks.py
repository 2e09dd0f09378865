"""The checks of gpu.py that train: overlap, parity, page-locked memory, the state. Attention has its own file."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from muond import Receipt
from muond.torch import AdamW, Muon, Optimizer, suggest
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpuattention
from checks import Checks
from gpt import Gpt, batches, gpt
from service import ROOT
from steptime import step_times
from syncs import a_cpu_copy_raises, keep_busy, syncs_are_errors

WARM_UP = 20
SIZES = {"vocabulary": 256, "width": 64, "heads": 4, "layers": 2, "context": 64}
_TEXT = (ROOT / "docs" / "algorithms.md").read_bytes()
# The figures of a GPT-2 step are left out of the table where fewer seconds are left.
_STEP_TIME_SECONDS = 30.0


def run(checks: Checks, device: torch.device, url: str, steps: int, *, step_time: bool) -> None:
    compiling = gpuattention.start_compiling(device)
    checks.part("overlap and parity", lambda: _overlap_and_parity(checks, device, url, steps))
    checks.part("no wait in backward", lambda: _no_wait(checks, device, url))
    checks.part("state", lambda: _state(checks, device, url))
    checks.part("AdamW", lambda: _adamw(checks, device, url))
    checks.part("GradScaler", lambda: _scaler(checks, device, url))
    checks.part("attention", lambda: gpuattention.check(checks, device, url))
    spare = checks.left - (_STEP_TIME_SECONDS if step_time else 5.0)
    checks.part("compiled", lambda: gpuattention.collect_compiled(checks, compiling, max(1.0, spare)))
    if step_time:
        checks.part("step of GPT-2", lambda: _step_time(checks, device, url))


@dataclass
class Trained:
    model: Gpt
    losses: torch.Tensor
    digests: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _warm_up_then_decay(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / steps)


def _train(
    device: torch.device,
    make: Callable[[Gpt], list[torch.optim.Optimizer]],
    steps: int,
    *,
    schedule: int,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
) -> Trained:
    model = gpt(device, **SIZES)
    optimizers = make(model)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_up_then_decay(step, schedule))
        for optimizer in optimizers
    ]
    losses: list[torch.Tensor] = []
    began = time.perf_counter()
    # The only backend whose backward pass gives the same bits every time.
    with sdpa_kernel(SDPBackend.MATH):
        for batch in itertools.islice(batches(_TEXT, 8, SIZES["context"] + 1, device), steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = model.loss(batch)
            backward(loss)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.step()
                rate.step()
            losses.append(loss.detach())
    answer = Trained(model, torch.stack(losses).cpu())
    answer.seconds = (time.perf_counter() - began) / steps
    return answer


def _served(device: torch.device, url: str, run: str, steps: int, *, overlap: bool, schedule: int) -> Trained:
    digests: list[str] = []
    with contextlib.ExitStack() as stack:

        def make(model: Gpt) -> list[torch.optim.Optimizer]:
            groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
            callback: Callable[[Receipt], object] = lambda receipt: digests.append(receipt.digest)  # noqa: E731
            given = Optimizer(model.named_parameters(), groups, url=url, run=run, overlap=overlap, callback=callback)
            return [stack.enter_context(given)]

        trained = _train(device, make, steps, schedule=schedule)
    trained.digests = digests
    return trained


def _local(device: torch.device, steps: int, *, schedule: int) -> Trained:
    def make(model: Gpt) -> list[torch.optim.Optimizer]:
        hidden, rest = ([parameter for _, parameter in group["params"]] for group in suggest(model, quiet=True))
        return [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]

    return _train(device, make, steps, schedule=schedule)


def _same(ours: Gpt, theirs: Gpt) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@contextlib.contextmanager
def _same_bits_twice() -> Iterator[None]:
    """Has torch compute the same bits every time, wherever it can."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@_same_bits_twice()
def _overlap_and_parity(checks: Checks, device: torch.device, url: str, wanted: int) -> None:
    few = min(wanted, 30)
    again = _served(device, url, "again", few, overlap=False, schedule=wanted)
    # Three trainings of so many steps in half of the time that is left; as many as wanted on any GPU.
    steps = max(few, min(wanted, int(checks.left / 2 / 3 / again.seconds)))
    plain = _served(device, url, "plain", steps, overlap=False, schedule=wanted)
    overlapped = _served(device, url, "overlap", steps, overlap=True, schedule=wanted)
    agreeing = sum(a == b for a, b in zip(plain.digests, again.digests, strict=False))
    checks.add(f"the same training twice, {few} steps", f"{agreeing} equal digests", f"{few}", agreeing == few)
    agreeing = sum(a == b for a, b in zip(plain.digests, overlapped.digests, strict=True))
    same = _same(plain.model, overlapped.model)
    checks.add(
        f"with and without overlap, {steps} steps",
        f"{agreeing} equal digests, weights {'equal' if same else 'differ'}",
        "all, bit for bit",
        agreeing == steps and same,
    )
    local = _local(device, steps, schedule=wanted)
    for name, trained in (("without overlap", plain), ("overlap", overlapped)):
        apart = ((trained.losses - local.losses).abs() / local.losses)[min(WARM_UP, steps - 1) :].max().item()
        what = f"losses against torch.optim, {steps} steps, {name}"
        checks.add(what, f"{100 * apart:.3f} % at most", "<= 1 %", apart <= 0.01)
    learnt = (plain.losses[-1] / plain.losses[0]).item()
    checks.add("loss, last over first", f"{learnt:.3f}", "< 1", learnt < 1)
    for name, trained in (("torch.optim", local), ("without overlap", plain), ("overlap", overlapped)):
        checks.note(f"step of the small GPT, {name}", f"{1e3 * trained.seconds:.2f} ms")


def _no_wait(checks: Checks, device: torch.device, url: str) -> None:
    gpu = device.type == "cuda"
    if gpu:
        raises = a_cpu_copy_raises(device)
        checks.add("a .cpu() in backward would be noticed", "an error" if raises else "no error", "an error", raises)
    model = gpt(device, **SIZES)
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
    steps, busy_from = 7, 3
    waited = under_way = quiet = 0
    backward_seconds: list[float] = []
    with Optimizer(model.named_parameters(), groups, url=url, run="no-wait", overlap=True) as optimizer:
        for step, batch in enumerate(itertools.islice(batches(_TEXT, 8, 65, device), steps)):
            optimizer.zero_grad()
            loss = model.loss(batch)
            # The first step allocates, and the first one behind a busy GPU once more.
            with syncs_are_errors(device) if step > 0 else contextlib.nullcontext():
                busy = keep_busy(device) if gpu and step >= busy_from else None
                began = time.perf_counter()
                loss.backward()  # type: ignore[no-untyped-call]
                backward_seconds.append(time.perf_counter() - began)
            quiet += step > 0
            waited += busy is not None and step > busy_from and busy.query()
            under_way += all(optimizer.run.has_gradient(index) for index in range(len(list(model.parameters()))))
            optimizer.step()
        checks.add("gradients under way before step()", f"in {under_way} of {steps} steps", "all", under_way == steps)
        if not gpu:
            checks.note("waits in backward, page-locked memory", "not tried: no GPU")
            return
        checks.add("backward under set_sync_debug_mode('error')", f"{quiet} steps", "no error", quiet == steps - 1)
        took = f"{1e3 * max(backward_seconds[busy_from + 1 :]):.1f} ms at most"
        checks.add("backward behind a busy GPU", f"waited in {waited} of 3 steps, {took}", "0", waited == 0)
        _page_locked(checks, optimizer)


def _page_locked(checks: Checks, optimizer: Optimizer) -> None:
    sent = list(optimizer._staging._buffers.values())
    received = [torch.from_numpy(b) for those in optimizer.run._memory._free.values() for b in those]
    for name, buffers in (("gradients", sent), ("updates", received)):
        locked = sum(buffer.is_pinned() for buffer in buffers)
        checks.add(
            f"page-locked buffers of {name}",
            f"{locked} of {len(buffers)}",
            "all",
            locked == len(buffers) > 0,
        )


def _state(checks: Checks, device: torch.device, url: str) -> None:
    shapes = [(64, 192), (128, 64)]
    ours = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    reference = torch.optim.Muon(theirs, lr=0.02)
    with Muon(ours, lr=0.02, url=url, run="state") as optimizer:
        for step in range(10):
            torch.manual_seed(step)
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.randn(a.shape, device=device)
                b.grad = a.grad.clone()
            optimizer.step()
            reference.step()
        state = optimizer.state_dict()["state"]
    apart = 0.0
    for index, twin in enumerate(theirs):
        buffer = reference.state[twin]["momentum_buffer"].cpu()
        apart = max(apart, float((state[index]["momentum_buffer"] - buffer).norm() / buffer.norm()))
    checks.add("momentum of Muon against torch's", f"{apart:.1e}", "<= 2^-9, of bfloat16", apart <= 2**-9)


def _adamw(checks: Checks, device: torch.device, url: str) -> None:
    ours, theirs = (torch.zeros(50, 40, device=device, requires_grad=True) for _ in range(2))
    reference = torch.optim.AdamW([theirs], lr=1e-2)
    apart = 0.0
    with AdamW([ours], lr=1e-2, url=url, run="adamw", gradient_dtype="float32", update_dtype="float32") as optimizer:
        for step in range(1, 41):
            torch.manual_seed(step)
            gradient = torch.randn(50, 40, device=device)
            for weights, each in ((ours, optimizer), (theirs, reference)):
                # A step from weights of zero leaves the direction times the learning rate.
                weights.detach().zero_()
                weights.grad = gradient.clone()
                each.step()
            apart = max(apart, float((ours.detach() - theirs.detach()).abs().max()) / 1e-2)
    checks.add("direction of AdamW in float32 against torch's", f"{apart:.1e}", "<= 1e-6", apart <= 1e-6)


def _scaler(checks: Checks, device: torch.device, url: str) -> None:
    """float16 with a scale that overflows at first: that step is left out, the others are taken."""
    model = gpt(device, **SIZES)
    groups = suggest(model, muon={"lr": 0.02}, adamw={"lr": 3e-3}, quiet=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=1000)
    with Optimizer(model.named_parameters(), groups, url=url, run="scaler") as optimizer:
        skipped = 0
        for batch in itertools.islice(batches(_TEXT, 8, 65, device), 40):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                loss = model.loss(batch)
            before = optimizer.step_count
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            skipped += optimizer.step_count == before
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
        holds = 0 < skipped < 40 and optimizer.step_count == 40 - skipped and finite
        measured = f"{skipped} skipped, {optimizer.step_count} taken, weights {'finite' if finite else 'NaN or Inf'}"
    checks.add("GradScaler that begins too high, 40 steps", measured, "some of both", holds)


def _step_time(checks: Checks, device: torch.device, url: str) -> None:
    for overlap in (False, True):
        name = f"step of GPT-2 124M, {'overlap' if overlap else 'without overlap'}"
        run = "gpt2-overlap" if overlap else "gpt2"
        if checks.left < _STEP_TIME_SECONDS:
            checks.note(name, f"not measured: {checks.left:.0f} s are left")
            continue
        times = step_times(
            device,
            url,
            run,
            overlap=overlap,
            steps=5,
            tokens=(4, 513),
            algorithm="muon",
        )
        checks.note(
            name,
            f"{1e3 * times.whole:.0f} ms (backward {1e3 * times.backward:.0f}, step() {1e3 * times.step:.0f}; "
            f"{1e3 * min(times.all):.0f} to {1e3 * max(times.all):.0f})",
        )
