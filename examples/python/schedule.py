"""The learning rate of the examples, as torch.optim.lr_scheduler.LambdaLR takes it."""

from __future__ import annotations

WARM_UP = 0.1


def rate_at(step: int, steps: int) -> float:
    """The factor on the learning rate: up to 1 over the first tenth of the steps, then linearly down to a tenth."""
    return min(1.0, (step + 1) / max(1, int(WARM_UP * steps))) * (1 - 0.9 * step / steps)
