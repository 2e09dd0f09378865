"""One thread for torch: several that spin and wait for each other are slow on a machine with other work."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
