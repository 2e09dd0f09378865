"""The client against ``muond conformance``, which does to it whatever may happen to a client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from service import SERVER, build

TRAINER = Path(__file__).with_name("conformance_trainer.py")
LIMIT_SECONDS = 120


def test_the_client_passes_whole() -> None:
    build()
    flags = ["ws://127.0.0.1:0", "--quadratic", "--slow", "0.2", "--patience", "30", "--json"]
    command = ["node", str(SERVER), "conformance", *flags, "--", sys.executable, str(TRAINER)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    checks = json.loads(ended.stdout)["checks"]
    wrong = {check["check"]: check["faults"] for check in checks if check["result"] != "passed"}
    # Neither is for every client.
    assert wrong == {"skipped": [], "checkpoint": []}, ended.stderr
    assert ended.returncode == 0
