"""A progress bar, if tqdm is installed."""

from __future__ import annotations

from typing import Any

from ..receipt import Receipt


class Progress:
    """One line: the steps of a run, and what the last receipt said."""

    def __init__(self, run: str) -> None:
        try:
            from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
        except ModuleNotFoundError as error:
            raise ImportError(
                "progress=True needs tqdm, which is not installed: pip install 'muond[progress]'"
            ) from error
        self._bar: Any = tqdm(desc=run, unit=" steps", dynamic_ncols=True)

    def start(self, step: int) -> None:
        """The run has so many steps already."""
        self._bar.n = self._bar.initial = step
        self._bar.refresh()

    def show(self, receipt: Receipt) -> None:
        rates = ", ".join(f"{group['lr']:.3g}" for group in receipt.groups.values())
        self._bar.set_postfix_str(f"gradient norm {receipt.gradient_norm:.3g}, lr {rates}", refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
