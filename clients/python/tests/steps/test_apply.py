"""The arithmetic of an update, as docs/protocol.md lays it down, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from golden import GOLDEN, Golden
from muond.steps.apply import apply_update


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.title)
def test_the_bits_are_those_that_every_client_has(golden: Golden) -> None:
    weights = golden.weights.copy()
    with np.errstate(over="ignore"):
        apply_update(weights, golden.update)
    assert weights.tobytes() == golden.expected.tobytes()
