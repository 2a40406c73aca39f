"""What stands around a run: errors are logged, too little memory is survived, and one rank's failure stops all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from apt_core.error_log.log import ErrorLogger
from apt_core.errors import ConfigError
from apt_train.errors.recovery import OutOfMemoryRecovery, RecoverySettings, with_backoff
from apt_train.errors.watchdog import Watchdog, WatchdogSettings, open_watchdog

T = TypeVar("T")
log = logging.getLogger(__name__)

PLACES = ("rank", "step")
"""What the report of a run's errors counts by."""


class Guard:
    """Use as a context around the whole run, on all ranks alike.

    An error that leaves it is logged with rank and step, unless it is a wrong setting. With several ranks it then stops
    all of them and ends this process; alone it passes on.

    Args:
        folder: of the run, shared by the ranks.
    """

    def __init__(
        self, recovery: RecoverySettings, watchdog: WatchdogSettings, folder: Path, *, rank: int, num_ranks: int
    ) -> None:
        self.errors = ErrorLogger(folder / "errors", f"rank{rank}", PLACES)
        self.memory = OutOfMemoryRecovery(
            recovery, folder / "micro_batch_parts.json", has_collectives=num_ranks > 1, note=self.note
        )
        self.num_noted = 0
        self._watchdog: Watchdog | None = None
        if num_ranks > 1:
            self._watchdog = open_watchdog(watchdog, folder / "watchdog")
        self._recovery, self._rank = recovery, rank
        self._step, self._phase = 0, "start"

    def __enter__(self) -> Guard:
        if self._watchdog is not None:
            self._watchdog.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, ConfigError):
            self.note(error)
        if self.num_noted:
            log.warning("errors of this run: %s", self.errors.generate_error_report().markdown)
        if self._watchdog is not None:
            self._watchdog.__exit__(kind, error, at)

    def at(self, step: int, phase: str) -> None:
        """The run begins this part of a step; called with every micro-batch it tells that the run goes on."""
        self._step, self._phase = step, phase
        self.go_on()

    def go_on(self) -> None:
        """The run is where it was, but not stuck there."""
        if self._watchdog is not None:
            self._watchdog.progress(self._step, self._phase)

    @contextmanager
    def allow(self, seconds: float, phase: str) -> Iterator[None]:
        """Let a part that is known to take long, such as writing a checkpoint, take so many seconds."""
        before, self._phase = self._phase, phase
        with self._watchdog.allow(seconds, phase) if self._watchdog is not None else nullcontext():
            yield
        self._phase = before

    def retry(self, call: Callable[[], T], what: str) -> T:
        """Call until no passing fault of a disk or network comes, with ever longer waits.

        Raises:
            OSError: the fault does not pass.
        """
        return with_backoff(call, self._recovery, what, note=self.note, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        """Without counting as stalled."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.go_on()
            time.sleep(min(left, 1.0))

    def note(self, error: BaseException) -> None:
        """Log an error, whether or not the run goes on."""
        self.num_noted += 1
        self.errors.log_to_file(error, {"rank": self._rank, "step": self._step, "phase": self._phase})

    def note_once(self, error: BaseException) -> None:
        """Log what all ranks find alike."""
        if self._rank == 0:
            self.note(error)
