"""One thread for torch: several that spin and wait for each other are slow on a machine with other work."""

from __future__ import annotations

import pytest
import torch
from models import net, train
from patient import STEPS, adamw
from torch import nn

from service import Service

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def alone(shared: Service) -> tuple[nn.Module, str]:
    """A model and the digest of its run, after STEPS steps without any trouble."""
    model = net()
    with adamw(model, shared, "nothing-happens") as optimizer:
        train(model, optimizer, STEPS)
        return model, optimizer.run.digest
