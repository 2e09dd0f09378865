"""The programs of examples/python run as they are told to, and say in one line what they lack."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from programs import picture_size, run

from service import Service

SMALL = ("--width", 16, "--depth", 1, "--heads", 2, "--context", 16)


def rows(output: str) -> dict[str, str]:
    """The lines below the header of a table, by their first cell."""
    body = output.split("---\n", 1)[1].splitlines()
    return {re.split(" {2,}", line)[0]: line for line in body}


def test_four_optimizers_are_compared(shared: Service, tmp_path: Path) -> None:
    flags = (*SMALL, "--batch", 4, "--steps", 20, "--threshold", 0.01, "--url", shared.url)
    status, output, errors = run("train_gpt.py", *flags, cwd=tmp_path)
    assert status == 0, errors
    table = rows(output)
    assert list(table)[:4] == ["local-adamw", "local-muon", "muond-muon", "muond-muonclip"]
    losses = {name: float(line.split()[1]) for name, line in table.items() if name.startswith(("local", "muond"))}
    assert losses["muond-muon"] == pytest.approx(losses["local-muon"], rel=1e-2)
    assert max(losses.values()) < 5.6
    assert int(table["muond-muonclip"].split()[3]) > 0
    width, height = picture_size(tmp_path / "train_gpt.png")
    assert width > 800
    assert height > 800


def test_one_optimizer_of_torchs_needs_no_service(tmp_path: Path) -> None:
    flags = (*SMALL, "--steps", 2, "--optimizer", "local-adamw", "--url", "ws://127.0.0.1:1", "--out", "one.png")
    status, output, errors = run("train_gpt.py", *flags, cwd=tmp_path)
    assert (status, next(iter(rows(output)))) == (0, "local-adamw"), errors
    assert picture_size(tmp_path / "one.png")[0] > 800


def test_ranks_end_with_the_weights_of_one_process(tmp_path: Path) -> None:
    # It starts a service of its own, and exits with 1 if the weights differ.
    status, output, errors = run("train_ddp.py", *SMALL, "--batch", 4, "--steps", 10, cwd=tmp_path)
    assert status == 0, output + errors
    weights = {name: line.split()[-1] for name, line in rows(output).items() if name.startswith(("rank", "one"))}
    assert weights["rank 0 of 2"] == weights["rank 1 of 2"] == weights["one process, accumulating"]
    assert picture_size(tmp_path / "train_ddp.png")[0] > 800


def test_shards_have_one_run(shared: Service, tmp_path: Path) -> None:
    flags = (*SMALL, "--ranks", 2, "--batch", 4, "--steps", 4, "--url", shared.url)
    status, output, errors = run("train_fsdp.py", *flags, cwd=tmp_path)
    assert status == 0, output + errors
    ranks = [line.split() for name, line in rows(output).items() if name.startswith("rank ")]
    assert [rank[3] for rank in ranks] == ["50.0%", "50.0%"]
    assert len({rank[-1] for rank in ranks}) == 1
    assert picture_size(tmp_path / "train_fsdp.png")[0] > 800


def test_replicas_that_meet_send_a_part_of_the_bytes_and_one_may_be_killed(shared: Service, tmp_path: Path) -> None:
    flags = (
        *SMALL,
        "--replicas",
        2,
        "--batch",
        4,
        "--steps",
        50,
        "--pretrain",
        10,
        "--sync-every",
        10,
        "--seeds",
        1,
        "--url",
        shared.url,
    )
    status, output, errors = run("train_diloco.py", *flags, cwd=tmp_path)
    assert status == 0, output + errors
    table = rows(output)
    assert "1/10" in table["DiLoCo, float32"]
    assert "in 4 of 4 rounds" in table["DiLoCo, int4_block64"]
    assert "of 4 rounds" in table["DiLoCo, float32, one replica killed and back"]
    assert all(float(re.split(" {2,}", line)[1]) < 5.6 for name, line in table.items() if name.startswith("DiLoCo"))
    assert picture_size(tmp_path / "train_diloco.png")[0] > 800


def test_parity_holds_where_a_trainer_resumes(tmp_path: Path) -> None:
    status, output, errors = run("parity.py", "--steps", 24, "--variation", "resume", cwd=tmp_path)
    assert status == 0, output + errors
    assert output.count("holds") == 6
    assert "BROKEN" not in output


@pytest.mark.parametrize("program", ["train_gpt.py", "train_ddp.py", "train_fsdp.py", "train_hf.py", "parity.py"])
def test_without_node_one_line_says_so(tmp_path: Path, program: str) -> None:
    status, _, errors = run(program, cwd=tmp_path, PATH=str(tmp_path))
    assert status == 1
    assert errors == "node was not found: install Node.js 20 or later, or give the --url of a service that runs\n"


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    status, _, errors = run("train_ddp.py", "--batch", 5, cwd=tmp_path)
    assert status == 2
    assert errors.endswith("error: --batch 5 cannot be divided among --ranks 2\n")
