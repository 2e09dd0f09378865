"""One thread for torch, as for the other tests of it."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
