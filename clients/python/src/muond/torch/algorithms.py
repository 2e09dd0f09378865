"""torch.optim's optimizers by their names and signatures, computed by a service."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from .optimizer import Optimizer, Params
from .settings import Options, settings

Coefficients = tuple[float, float, float] | tuple[tuple[float, float, float], ...] | str
"""One triple, a list of triples, or the name of a set that the service knows; with ``ns_steps=None`` as many steps as it has."""


class Muon(Optimizer):
    """torch.optim.Muon with the same arguments; what torch has not comes after ``*``, and then ``Settings``.

    More than two dimensions are possible with ``layouts``. A parameter below two is refused, as torch does: give it to AdamW,
    or let ``muond.torch.suggest`` share a model out.
    """

    _algorithm = "muon"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int | None = 5,
        adjust_lr_fn: str | None = None,
        *,
        momentum_form: str = "ema",
        momentum_dtype: str = "float32",
        second_momentum: str = "none",
        beta2: float = 0.95,
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "momentum_form": momentum_form,
            "momentum_dtype": momentum_dtype,
            "second_momentum": second_momentum,
            "beta2": beta2,
            "algorithm": self._algorithm,
        }
        self._begin(params, defaults, settings(options))


class MuonClip(Muon):
    """Muon as Kimi K2 used it (arXiv 2507.20534): heavy-ball momentum, AdamW's update RMS, and QK-clip.

    ``attentions`` says which rows are queries and keys, ``max_logits`` (a ``muond.torch.MaxLogits``) measures the logits.
    Without them nothing is clipped. The other arguments are Muon's.
    """

    _algorithm = "muonclip"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        adjust_lr_fn: str | None = "match_rms_adamw",
        momentum_form: str = "heavy_ball",
        **more: Any,
    ) -> None:
        super().__init__(
            params, lr, weight_decay, momentum, adjust_lr_fn=adjust_lr_fn, momentum_form=momentum_form, **more
        )


class AdamW(Optimizer):
    """torch.optim.AdamW with the same arguments, and then ``Settings``.

    ``foreach`` and ``fused`` are taken and mean nothing here; ``capturable`` and ``differentiable`` are refused.
    """

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "algorithm": "adamw",
        }
        self._begin(params, defaults, settings(options))
