import sys

import muond
import numpy as np

weights = {"w": np.ones((32, 16), np.float32)}
with muond.open_run(
    sys.argv[1],
    run="python",
    groups=[{"name": "all", "algorithm": "muon", "lr": 0.1}],
    parameters=[muond.Parameter("w", "all", weights["w"])],
) as run:
    receipt = run.step({"w": np.sin(np.arange(512, dtype=np.float32)).reshape(32, 16)})
if receipt.step != 1 or receipt.applied != 1 or (weights["w"] == 1).all():
    sys.exit(f"{receipt}")
