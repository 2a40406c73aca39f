"""How a run shows itself while it goes on: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from typing import Protocol, TextIO

from tqdm import tqdm

from apt_train.monitor.metrics import StepMetrics


class Progress(Protocol):
    """Is told of every step."""

    def advance(self, metrics: StepMetrics) -> None:
        """One step is done."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class ProgressBar:
    """One line that is drawn over and over: steps, time left, loss, tokens a second.

    Args:
        total_steps: of the whole run.
        first_step: steps done already, as after a resume: the time left counts from here.
        file: where it is drawn.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0, file: TextIO | None = None) -> None:
        self._bar: tqdm[None] = tqdm(
            total=total_steps, initial=first_step, unit="step", file=file or sys.stderr, dynamic_ncols=True
        )

    def advance(self, metrics: StepMetrics) -> None:
        """See Progress."""
        self._bar.set_postfix(
            {
                "loss": f"{metrics.loss:.4f}",
                "tok/s": f"{metrics.tokens_per_second:,.0f}",
                "data": f"{metrics.waiting_share:.0%}",
            },
            refresh=False,
        )
        self._bar.update()

    def close(self) -> None:
        """Leave the line as it is and go to the next."""
        self._bar.close()


class ProgressLines:
    """A line every so many steps, and of the first and the last."""

    def __init__(self, total_steps: int, *, first_step: int = 0, every: int = 1, file: TextIO | None = None) -> None:
        self._total, self._every, self._file = total_steps, every, file or sys.stdout
        self._first = self._step = first_step
        self._start = time.monotonic()

    def advance(self, metrics: StepMetrics) -> None:
        """See Progress."""
        self._step += 1
        if self._step % self._every and self._step not in (self._first + 1, self._total):
            return
        left = (time.monotonic() - self._start) / (self._step - self._first) * (self._total - self._step)
        parts = [
            f"step {self._step}/{self._total}",
            f"loss {metrics.loss:.4f}",
            f"norm {metrics.gradient_norm:.3g}",
            f"lr {metrics.learning_rate:.2e}",
            f"{metrics.tokens_per_second:,.0f} tokens/s",
            f"{metrics.peak_share:.0%} of peak",
            f"{metrics.waiting_share:.1%} waiting for data",
            f"{timedelta(seconds=round(left))} left",
        ]
        print("  ".join(parts), file=self._file, flush=True)

    def close(self) -> None:
        """See Progress."""


class NoProgress:
    """For all ranks but the first."""

    def advance(self, metrics: StepMetrics) -> None:
        """See Progress."""

    def close(self) -> None:
        """See Progress."""


def open_progress(total_steps: int, *, first_step: int, every: int, rank: int) -> Progress:
    """A bar if stderr is a terminal, lines to stdout if not; of rank 0 only."""
    if rank != 0:
        return NoProgress()
    if sys.stderr.isatty():
        return ProgressBar(total_steps, first_step=first_step)
    return ProgressLines(total_steps, first_step=first_step, every=every)


class BarHandler(logging.Handler):
    """Writes log lines above a progress bar, if one is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        tqdm.write(self.format(record), file=sys.stderr)
