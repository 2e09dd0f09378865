"""The max_scores of a compiled flex_attention, in a process of its own: compiling takes longer than all other checks.

Prints how far they are from float64, relatively; ends with 3 where torch.compile does not work at all.
"""

from __future__ import annotations

import os
import sys
import traceback

# No pool of processes that would outlive this one.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from torch.nn.attention.flex_attention import flex_attention

from gpuattention import distance, measured

NO_COMPILER = 3


def main() -> int:
    device = torch.device(sys.argv[1])
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception:
        traceback.print_exc()
        return NO_COMPILER
    max_logits, wanted = measured(device, torch.compile(flex_attention))
    print(distance(max_logits, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
