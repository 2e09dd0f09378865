"""What was checked, what was measured, and whether it holds."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

from table import table


@dataclass(frozen=True)
class Check:
    """A check or a figure; ``holds`` is None where it was not tried or has no bound."""

    what: str
    measured: str
    asked: str
    holds: bool | None


class Checks:
    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._checks: list[Check] = []
        self.current = "the start"

    @property
    def left(self) -> float:
        """Seconds that are left for all checks."""
        return self._ends - time.monotonic()

    @property
    def hold(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return any(c.holds for c in self._checks) and all(c.holds is not False for c in self._checks)

    def add(self, what: str, measured: str, asked: str, holds: bool | None) -> None:
        self._checks.append(Check(what, measured, asked, holds))

    def note(self, what: str, measured: str) -> None:
        """A figure without a bound, or why something was not tried."""
        self.add(what, measured, "", None)

    def failed(self, what: str, error: BaseException) -> None:
        self.add(what, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}", "", False)

    def part(self, name: str, act: Callable[[], None]) -> None:
        """Runs some checks; an error is a failed check, and the others are tried all the same."""
        self.current = name
        began = time.monotonic()
        try:
            act()
        except Exception as error:
            traceback.print_exc()
            self.failed(name, error)
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    def render(self) -> str:
        words = {True: "pass", False: "FAIL", None: "-"}
        rows = [(c.what, c.measured, c.asked, words[c.holds]) for c in self._checks]
        return table(("check", "measured", "asked", ""), rows)

    def json(self) -> dict[str, object]:
        return {"checks": [asdict(check) for check in self._checks], "hold": self.hold}
