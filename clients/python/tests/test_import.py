"""What an import costs, and what it says where something is missing."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import muond
from muond import ErrorFields, MuondError


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_the_core_needs_numpy_and_nothing_else() -> None:
    loaded = run("import sys; import muond; print(*sorted(m.partition('.')[0] for m in sys.modules))").split()
    assert "numpy" in loaded
    for name in ("torch", "tqdm", "msgpack", "websockets", "asyncio", "typing_extensions"):
        assert name not in loaded


def test_without_torch_its_names_say_what_to_install() -> None:
    script = """
import sys
sys.modules["torch"] = None
import muond
try:
    muond.Muon
except ImportError as error:
    print(error)
"""
    assert run(script) == "muond.Muon needs PyTorch, which is not installed: pip install 'muond[torch]'"


def test_another_import_error_is_not_mistaken_for_a_missing_torch() -> None:
    script = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["muond.torch.slots"] = None
import muond
try:
    from muond import Muon
except ImportError as error:
    print("install" in str(error))
"""
    assert run(script) == "False"


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'muond' has no attribute 'Moun'"):
        muond.Moun  # noqa: B018


def test_errors_cross_process_boundaries() -> None:
    error = MuondError("RUN_BUSY", "busy", ErrorFields(step=3), status=409)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.fields.step, copy.status, copy.retryable) == (
        "busy [RUN_BUSY]",
        "RUN_BUSY",
        3,
        409,
        True,
    )
