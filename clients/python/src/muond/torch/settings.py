"""What every optimizer of this package takes beside its hyperparameters."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from typing_extensions import TypedDict

from ..receipt import Receipt
from ..steps.backoff import Backoff
from ..steps.writer import RETRIES
from ..wire.dtype import BLOCKS

if TYPE_CHECKING:
    from .max_logits import MaxLogits

Transport = Literal["auto", "cuda-ipc", "shm", "websocket"]
Mode = Literal["create", "resume", "create_or_resume"]
OnNonfinite = Literal["skip_step", "skip_parameter", "raise"]
Dtype = Literal["float32", "bfloat16", "float16", "int8_block256", "int4_block64"]
WIRE_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    # What travels in blocks is float32 before it is encoded, and once it is decoded.
    **dict.fromkeys(BLOCKS, torch.float32),
}


class Options(TypedDict, total=False):
    """The keyword arguments of every optimizer; ``Settings`` says what they mean."""

    url: str | Sequence[str] | None
    run: str | None
    mode: Mode
    token: str | None
    headers: Mapping[str, str] | None
    ssl_context: ssl.SSLContext | None
    takeover: bool
    checkpoint: str | None
    retries: int
    backoff: Backoff | None
    chunk_bytes: int
    shards: int
    transport: Transport
    gradient_dtype: Dtype | torch.dtype | None
    update_dtype: Dtype | torch.dtype | None
    error_feedback: bool
    layouts: Mapping[str, Mapping[str, Any]]
    attentions: Sequence[Mapping[str, Any]]
    max_logits: MaxLogits | None
    overlap: bool
    accumulation_steps: int
    on_nonfinite: OnNonfinite | None
    state: Literal["tensors", "checkpoint"]
    keep: Literal["cpu"] | None
    keep_last: int
    callback: Callable[[Receipt], object] | None
    progress: bool
    process_group: Any


@dataclass(frozen=True)
class Settings:
    url: str | Sequence[str] | None = None
    """``ws://host:port``, or several of which the first that answers is taken; default: the environment's MUOND_URL, then ws://127.0.0.1:8787."""
    run: str | None = None
    """Name of the run; default: a new one."""
    mode: Mode = "create"
    """``create`` refuses a run that exists, unless a state_dict is loaded; ``resume`` goes on with the state that the service has."""
    token: str | None = None
    headers: Mapping[str, str] | None = None
    ssl_context: ssl.SSLContext | None = None
    takeover: bool = False
    checkpoint: str | None = None
    retries: int = RETRIES
    backoff: Backoff | None = None
    chunk_bytes: int = 1 << 24
    shards: int = 0
    """Over how many processes of the service a new run is to be spread; 0: as the service has it."""
    transport: Transport = "auto"
    """How gradients and updates travel. ``cuda-ipc``: in memory of the GPU, shared with a service on the same one. ``shm``: in host
    memory, shared with a service on this host. ``websocket``: over the socket. ``auto``: the first of these that works."""
    gradient_dtype: Dtype | torch.dtype | None = None
    """How gradients travel, unless their group says otherwise; default: see ``wire_dtype``."""
    update_dtype: Dtype | torch.dtype | None = None
    error_feedback: bool = True
    """Whether what ``int8_block256`` and ``int4_block64`` lose of a gradient is added to the next one (Karimireddy et al., 2019,
    arXiv 1901.09847). ``state`` has it as ``error_feedback``, float32, and so has ``state_dict()``."""
    layouts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{name or pattern: {``split``, ``heads`` or ``matrices``}}: what matrices a parameter consists of."""
    attentions: Sequence[Mapping[str, Any]] = ()
    """For QK-clip; ``parameter`` is a name or the parameter itself."""
    max_logits: MaxLogits | None = None
    overlap: bool = False
    """Send each gradient as soon as the backward pass has it."""
    accumulation_steps: int = 1
    """With ``overlap``: backward passes before ``step()``; the gradients of the last one are sent."""
    on_nonfinite: OnNonfinite | None = None
    """What becomes of a step with NaN or Inf in a gradient.

    ``skip_step``: nothing moves, and a warning says whose gradient it was. ``raise``: nothing moves, and ``step()`` raises.
    ``skip_parameter``: that parameter is left out. Default: ``skip_step``; with ``overlap``, where gradients have left before
    they are all known, it is left out and ``step()`` raises.
    """
    state: Literal["tensors", "checkpoint"] = "tensors"
    """What ``state_dict()`` holds: the state itself, or the id of a checkpoint that the service keeps."""
    keep: Literal["cpu"] | None = None
    """Keep the weights of each checkpoint in host memory, for ``rollback()``."""
    keep_last: int = 1
    callback: Callable[[Receipt], object] | None = None
    progress: bool = False
    process_group: Any = None
    """The processes that have the same whole model and, once they are reduced, the same gradients (DistributedDataParallel):
    a ``torch.distributed.ProcessGroup``. Each sends its part of every gradient. Left out, they are found with the first step where a
    DistributedDataParallel has the parameters; False: this process alone has an optimizer. Sharded parameters say themselves who has
    what."""

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, ("create", "resume", "create_or_resume"))
        _one_of("transport", self.transport, ("auto", "cuda-ipc", "shm", "websocket"))
        _one_of("on_nonfinite", self.on_nonfinite, (None, "skip_step", "skip_parameter", "raise"))
        if self.overlap and self.on_nonfinite == "skip_step":
            raise ValueError(
                "on_nonfinite='skip_step' needs overlap=False: with overlap the other gradients have left already"
            )
        _one_of("state", self.state, ("tensors", "checkpoint"))
        _one_of("keep", self.keep, (None, "cpu"))
        for name, least in (("accumulation_steps", 1), ("keep_last", 1), ("shards", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, at least {least}")


def settings(options: Mapping[str, Any]) -> Settings:
    """Raises TypeError for an option that there is not."""
    known = {entry.name for entry in fields(Settings)}
    for name in options:
        if name not in known:
            raise TypeError(
                f"unexpected keyword argument '{name}', expected a hyperparameter or one of {', '.join(sorted(known))}"
            )
    return Settings(**options)


def wire_dtype(name: str, asked: Dtype | torch.dtype | None, parameter: torch.Tensor) -> str:
    """The dtype of the gradients or updates of a parameter, by its name on the wire.

    bfloat16 unless asked otherwise, but float16 for float16 parameters and float32 for float64 ones. ``name`` is for the error.
    """
    if asked is None:
        return {torch.float16: "float16", torch.float64: "float32"}.get(parameter.dtype, "bfloat16")
    text = str(asked).removeprefix("torch.")
    _one_of(name, text, tuple(WIRE_DTYPES))
    return text


def _one_of(name: str, value: object, values: Sequence[object]) -> None:
    if value not in values:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(repr(known) for known in values)}")
