"""The progress bar of a run: loss, tokens a second and the time that is left."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

from apt_train.monitor.metrics import StepMetrics


class ProgressBar:
    """One line on a terminal, on rank 0 only; elsewhere, and where stderr is no terminal, nothing.

    Args:
        total_steps: of the whole run.
        first_step: steps done already, as after a resume: the time left counts from here.
        file: where it is drawn even if that is no terminal; None is stderr, if it is one.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0, rank: int = 0, file: TextIO | None = None) -> None:
        is_off = True if rank != 0 else None if file is None else False  # None: off unless on a terminal
        self._bar: tqdm[None] = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=is_off, file=file, dynamic_ncols=True
        )

    def advance(self, metrics: StepMetrics) -> None:
        """One step is done."""
        values = {"loss": f"{metrics.loss:.4f}", "tok/s": f"{metrics.tokens_per_second:,.0f}"}
        self._bar.set_postfix(values, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the line as it is and go to the next."""
        self._bar.close()
