"""One thread for torch, as in tests/torch; and nothing is looked for on the network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps what it is told in singletons, which outlive the test that told it."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
