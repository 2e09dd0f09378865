"""The package's README: its code runs, its tables and printed lines are what there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from muond.torch.settings import Settings
from service import Service

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


# transformers, accelerate and what they import warn of each other.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_its_code_runs_from_top_to_bottom(
    durable: Callable[..., Service],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MUOND_URL", durable().url)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    assert len(BLOCKS) == 7
    for block in BLOCKS:
        exec(block, names)
    printed = capsys.readouterr().out
    [table] = re.findall(r"```text\n(.*?)…\n```", README, re.DOTALL)
    assert table in printed
    assert "{'h.0': 0}" in printed


def test_it_lists_every_option() -> None:
    section = README.split("## Options")[1].split("\n## ")[0]
    listed = re.findall(
        r"`(\w+)`", " ".join(row.split("|")[1] for row in re.findall(r"^\| `.*", section, re.MULTILINE))
    )
    assert sorted(listed) == sorted(Settings.__dataclass_fields__)


def test_its_table_of_promises_names_tests_that_are_there() -> None:
    section = README.split("## What torch promises")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (?!promise)(.*) \|$", section, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert len(rows) == 48
    folder = Path(__file__).parents[1]
    there = {path.stem for path in [*folder.rglob("test_*.py"), *folder.glob("ecosystem/*_learner.py")]}
    for promise, kept, otherwise, tests in rows:
        assert kept in ("yes", "no"), promise
        assert (kept == "yes") or otherwise, promise
        assert {*tests.split(", ")} <= there, promise
