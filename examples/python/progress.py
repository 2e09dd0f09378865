"""Progress on standard error: tqdm's bar if it is installed, else a line for every tenth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Gives the function to call with the number of steps done and a note."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ModuleNotFoundError:
        yield _lines(label, total)
        return
    with tqdm(total=total, desc=label, unit="step", dynamic_ncols=True) as bar:

        def show(done: int, note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield show


def _lines(label: str, total: int) -> Callable[[int, str], None]:
    def show(done: int, note: str) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            print(f"{label} {done}/{total} {note}", file=sys.stderr)

    return show
