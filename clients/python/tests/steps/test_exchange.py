"""What a connection says in the middle of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from muond import MuondError
from muond.steps.exchange import Exchange, How
from muond.steps.step import Step
from peer import ERROR


def test_behind_an_error_of_the_step_others_are_its_consequence() -> None:
    step = Step(1, {})
    exchange: Exchange

    def send(_: object) -> None:
        for code, more in (
            ("MAX_LOGITS_INVALID", {}),
            ("STEP_CONFLICT", {"parameter": 0, "status": 409}),
            ("STEP_CONFLICT", {}),
        ):
            exchange.frame({**ERROR, "code": code, **more})

    connection: Any = SimpleNamespace(listen=lambda *_: None, send=send)
    exchange = Exchange(connection, step, cast(Any, None), How(1, None, False, 0))
    step.finish([0])
    with pytest.raises(MuondError, match="MAX_LOGITS_INVALID"):
        exchange.run()
