"""An optimizer that waits for a service that is started again, and what comes out where nothing happens to it."""

from __future__ import annotations

from typing import Any

from torch import nn

import muond
from muond.torch import AdamW
from service import Service

STEPS = 8
# A service takes seconds to start.
PATIENT: Any = {"backoff": muond.Backoff(first_seconds=0.05, most_seconds=0.5), "retries": 400}


def adamw(model: nn.Module, service: Service, name: str | None, **options: Any) -> AdamW:
    return AdamW(model.named_parameters(), lr=1e-2, url=service.url, run=name, **{**PATIENT, **options})
