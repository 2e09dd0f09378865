"""Checkpoints of a torch optimizer, a service that is killed, and going back to where both sides have been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import distance, gpt, loss_of, net, train
from patient import PATIENT, STEPS, adamw
from torch import nn

from muond import MuondError
from muond.rest import Rest
from muond.torch import MaxLogits, MuonClip
from service import Service, damage


@pytest.mark.parametrize("overlap", [False, True])
def test_a_service_killed_mid_epoch_changes_nothing_with_a_journal(
    durable: Callable[..., Service], name: str, alone: tuple[nn.Module, str], overlap: bool
) -> None:
    service = durable("--durability", "journal")
    model = net()
    with adamw(model, service, name, overlap=overlap) as optimizer:
        train(model, optimizer, 3)
        optimizer.zero_grad()
        loss_of(model, 4).backward()  # type: ignore[no-untyped-call]
        service.kill_and_restart()
        assert optimizer.step().durable
        train(model, optimizer, STEPS - 4, 5)
        assert optimizer.run.digest == alone[1]
    assert distance(model, alone[0]) == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_rollback_goes_to_the_last_step_that_both_sides_have(
    durable: Callable[..., Service], name: str, alone: tuple[nn.Module, str], overlap: bool
) -> None:
    service = durable()
    model = net()
    with adamw(model, service, name, overlap=overlap, keep="cpu", error_feedback=overlap) as optimizer:
        step, conflicts = 0, 0
        while step < STEPS:
            try:
                train(model, optimizer, 1, step + 1)
            except MuondError as error:
                assert error.code == "STEP_CONFLICT"  # noqa: PT017 - the loop goes on
                assert "go back to your weights of step 4" in error.message  # noqa: PT017
                conflicts += 1
                optimizer.param_groups[0]["lr"] = 7.0
                step = optimizer.rollback()
                assert all(parameter.grad is None for parameter in model.parameters())
                continue
            step += 1
            if step in (2, 4):
                optimizer.checkpoint()
            if step == 6 and conflicts == 0:
                service.kill_and_restart()
        assert (conflicts, optimizer.run.digest) == (1, alone[1])
        assert optimizer.param_groups[0]["lr"] == 1e-2
    assert distance(model, alone[0]) == 0


def test_without_weights_here_there_is_nothing_to_go_back_to(durable: Callable[..., Service], name: str) -> None:
    model = net()
    with adamw(model, durable(), name) as optimizer:
        train(model, optimizer, 1)
        assert optimizer.checkpoint("mine").step == 1
        with pytest.raises(MuondError, match="has no weights kept here: checkpoint\\(\\) keeps them with keep='cpu'"):
            optimizer.rollback()
        train(model, optimizer, 1, 2)


def test_as_many_are_kept_as_were_asked_for_whatever_the_service_keeps_by_itself(
    durable: Callable[..., Service], name: str, alone: tuple[nn.Module, str], tmp_path: Path
) -> None:
    service = durable("--checkpoints-kept", "1", "--checkpoint-steps", "1")
    model = net()
    with adamw(model, service, name, keep="cpu", keep_last=2) as optimizer:
        for step in (1, 2, 3):
            train(model, optimizer, 1, step)
            assert optimizer.checkpoint("mine" if step == 2 else None).step == step
        train(model, optimizer, 3, 4)
        assert [kept.checkpoint.step for kept in optimizer._shelf.kept] == [2, 3]
        # The newer one is lost with its files, and the service cannot go on from its own newest one either.
        newest = optimizer.run.checkpoint()
        service.kill()
        for checkpoint in (newest.id, optimizer._shelf.kept[1].checkpoint.id):
            damage(tmp_path, name, checkpoint)
        service.restart()
        assert optimizer.rollback() == 2
        assert [kept.checkpoint.step for kept in optimizer._shelf.kept] == [2]
        train(model, optimizer, STEPS - 2, 3)
        assert optimizer.run.digest == alone[1]
        # Again to the same one, without a restart.
        assert optimizer.rollback() == 2
        damaged = optimizer._shelf.kept[0].checkpoint.id
        damage(tmp_path, name, damaged)
        train(model, optimizer, 1, 3)
        with pytest.raises(MuondError, match="CHECKPOINT_UNREADABLE"):
            optimizer.rollback()
    assert distance(model, alone[0]) > 0


def test_a_service_that_is_gone_is_no_reason_to_take_an_older_one(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    model = net()
    with adamw(model, service, name, keep="cpu", retries=0) as optimizer:
        train(model, optimizer, 1)
        optimizer.checkpoint()
        service.kill()
        with pytest.raises(MuondError, match="CONNECTION_LOST"):
            optimizer.rollback()
        service.restart()
        assert optimizer.rollback() == 1


def test_a_checkpoint_of_another_history_is_not_taken_for_this_one(durable: Callable[..., Service], name: str) -> None:
    service = durable()
    model = net()
    with adamw(model, service, name, keep="cpu") as optimizer:
        train(model, optimizer, 1)
        optimizer.checkpoint()
        optimizer.run.release()
        with Rest(optimizer.run.address) as rest:
            rest.delete(name)
        other = net()
        with adamw(other, service, name, state="checkpoint") as second:
            train(other, second, 1, 5)
            second.checkpoint()
        with pytest.raises(MuondError, match=r"has digest \w+, expected \w+: it is of another history") as caught:
            optimizer.rollback()
        assert caught.value.code == "STEP_CONFLICT"


def test_logits_are_measured_at_the_same_steps_after_going_back(durable: Callable[..., Service], name: str) -> None:
    model = gpt(width=16, layers=1)
    max_logits = MaxLogits(every=4)
    max_logits.watch({"h.0": model.h[0].attn})
    rows: dict[str, Any] = {"query": "h.0.attn.qkv.weight", "key": ("h.0.attn.qkv.weight", 16)}
    attentions = [{"name": "h.0", "query_heads": 4, "head_dim": 4, **rows}]
    hidden = [(key, p) for key, p in model.named_parameters() if key == "h.0.attn.qkv.weight"]
    clipped: list[bool] = []

    def steps(optimizer: MuonClip, count: int) -> None:
        for _ in range(count):
            model.loss(torch.arange(34).view(2, 17)).backward()  # type: ignore[no-untyped-call]
            clipped.append("h.0" in optimizer.step().clipped_heads)
            model.zero_grad()

    options: Any = {"attentions": attentions, "max_logits": max_logits, "keep": "cpu", **PATIENT}
    with MuonClip(hidden, url=durable().url, run=name, **options) as optimizer:
        steps(optimizer, 2)
        optimizer.checkpoint()
        steps(optimizer, 1)
        assert optimizer.rollback() == 2
        steps(optimizer, 3)
    assert clipped == [True, False, False, False, False, True]
