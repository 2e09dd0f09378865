"""Models that FSDP2 shards train as one process does, bit for bit, and go on with another number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import sharded
import torch

from service import Service


def run_ranks(work: str, world_size: int, folder: Path, **given: Any) -> None:
    """Runs a function of sharded.py in so many processes. A rank that fails shows what it wrote."""
    command = [sys.executable, sharded.__file__, work]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder), json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    written = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(written)


def test_ranks_train_as_one_process_and_resume_with_another_number(shared: Service, name: str, tmp_path: Path) -> None:
    module = sharded.model()
    muon = sharded.optimizer(module, shared.url, f"{name}-alone")
    expected = sharded.train(module, muon, range(1, 9))
    muon.close()
    digests: list[list[Any]] = []
    for first, world_size in ((1, 4), (4, 2), (6, 3)):
        last = {1: 4, 4: 6, 6: 9}[first]
        mode = "create" if first == 1 else "resume"
        run_ranks("main", world_size, tmp_path, url=shared.url, run=name, mode=mode, steps=[first, last])
        digests += json.loads((tmp_path / "digests.json").read_text())
    assert [tuple(one) for one in digests] == expected
    got = torch.load(tmp_path / "weights.pt")
    for key, weights in sharded.whole(module).items():
        assert torch.equal(got[key].view(torch.int32), weights.view(torch.int32)), key
