"""One rank's failure stops all, with one report; a rank that hangs is found.

A thread of every rank posts heartbeats and reads the others'. Who notices first that a rank has failed, ended, gone
silent or stalled posts a stop; all ranks then write where their threads are, the noticing one makes one report of it,
and every process ends with an exit code that says why.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch.distributed as dist

from apt_core.errors import AptError, ConfigError
from apt_train.errors.board import Board, Heartbeat, ProcessId, Stop
from apt_train.errors.stop_report import report_text

log = logging.getLogger(__name__)


class ExitCode(IntEnum):
    """How a process ends that the watchdog ends."""

    FAILED = 81
    """An error of its own."""
    STOPPED = 82
    """Another rank is at fault."""
    STALLED = 83
    """It made no progress, or had gone silent and came back."""


@dataclass(frozen=True)
class WatchdogSettings:
    """How soon a rank counts as lost. Found and reported: 10 s for a lost rank, 15 s for a stall, by default."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    interval_s: float = 0.5
    """Between heartbeats."""
    silent_after_s: float = 7.0
    """Without a heartbeat for so long a rank counts as lost; one whose process has ended on this machine at once."""
    stall_after_s: float = 11.0
    """Without progress of the main thread for so long a rank counts as stalled; for longer where the same phase of
    another step took longer than a third of it."""
    start_s: float = 600.0
    """The same for the first time of each phase, which may compile."""
    settle_s: float = 1.5
    """How long a report waits for what other ranks say."""

    def __post_init__(self) -> None:
        if not 0 < self.interval_s < self.silent_after_s:
            raise ConfigError("must be positive and less than silent_after_s", field="interval_s")
        if not 0 < self.stall_after_s <= self.start_s:
            raise ConfigError("must be positive and at most start_s", field="stall_after_s")


def open_watchdog(settings: WatchdogSettings, folder: Path) -> Watchdog:
    """The watchdog of this rank of torch's default group; all ranks call this. The folder is one they share."""
    name: list[Any] = [f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"]
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.broadcast_object_list(name, src=0)  # no rank must find the files of an earlier run
    return Watchdog(settings, folder / name[0], rank=rank, size=size)


class Watchdog:
    """Use as a context around the training loop: an error that leaves it stops all ranks and ends the process.

    Args:
        folder: of this run of the job only, shared by all ranks.
    """

    def __init__(self, settings: WatchdogSettings, folder: Path, *, rank: int, size: int) -> None:
        self.settings, self.rank = settings, rank
        self._board = Board(folder)
        self._process = ProcessId.own()
        self._others = [_Other(other) for other in range(size) if other != rank]
        self._step, self._phase, self._progress, self._count = 0, "start", 0, 0
        self._last_progress = time.monotonic()
        self._allowed_s = settings.start_s
        self._usual: dict[str, _Phase] = {}
        self._end = threading.Event()
        self._ending = threading.Lock()
        self._stacks = self._board.stacks_file(rank).open("w", encoding="utf-8")
        self._thread = threading.Thread(target=self._watch, name="apt-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._post()
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
            self.fail(error)
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._post(is_done=True)
        self._stacks.close()

    def progress(self, step: int, phase: str = "step") -> None:
        """The main thread begins this phase; costs nothing, so call it with every micro-batch."""
        now = time.monotonic()
        if self._phase in self._usual:
            self._usual[self._phase].took(now - self._last_progress)
        usual = self._usual.setdefault(phase, _Phase())
        self._allowed_s = usual.allowed_s(self.settings)
        self._step, self._phase, self._last_progress = step, phase, now
        self._progress += 1

    @contextmanager
    def allow(self, seconds: float, phase: str) -> Iterator[None]:
        """Let the main thread be without progress for longer, as while it compiles or writes a checkpoint."""
        before = self._allowed_s, self._phase
        self._allowed_s, self._phase, self._last_progress = seconds, phase, time.monotonic()
        try:
            yield
        finally:
            self._last_progress = time.monotonic()
            self._allowed_s, self._phase = before

    def fail(self, error: BaseException) -> None:
        """Stop all ranks because of an error of this one. Does not return: the process ends."""
        text = "".join(traceback.format_exception(error))
        # What was raised on purpose says enough; the report has the rest.
        print(f"{type(error).__name__}: {error}" if isinstance(error, AptError) else text, file=sys.stderr, flush=True)
        if _is_of_collective(error):
            self._wait_for_another_cause()
        cause = f"rank {self.rank} failed: {type(error).__name__}: {error}"
        stop = Stop(cause, (self.rank,), self._step, self.rank, text)
        self._stop_all(stop, ExitCode.FAILED)

    def _wait_for_another_cause(self) -> None:
        """A collective fails on all other ranks when one has ended: that one is to be named."""
        deadline = time.monotonic() + self.settings.settle_s
        while time.monotonic() < deadline and self._board.stop() is None:
            lost = self._lost()
            if lost is not None:
                self._stop_all(lost, ExitCode.STOPPED)
            time.sleep(self.settings.interval_s / 5)

    # The watchdog's thread.

    def _watch(self) -> None:
        try:
            while not self._end.wait(self.settings.interval_s):
                self._look()
        except BaseException as error:  # without it a failure of this rank would stop nobody
            self.fail(error)

    def _look(self) -> None:
        self._post()
        self._arm()
        stop = self._board.stop()
        if stop is not None:
            self._stop_all(stop, ExitCode.STALLED if self.rank in stop.ranks else ExitCode.STOPPED)
        elif (lost := self._lost()) is not None:
            self._stop_all(lost, ExitCode.STOPPED)
        elif self._is_stalled():
            cause = f"no progress for {self._allowed_s:g} s in phase {self._phase}"
            self._stop_all(Stop(cause, (), self._step, self.rank), ExitCode.STALLED)

    def _is_stalled(self) -> bool:
        """Not while any rank goes on, such as one that tries to read a file again: this one may wait for it."""
        if time.monotonic() - self._last_progress <= self._allowed_s:
            return False
        return all(other.is_still_for_s > self.settings.stall_after_s for other in self._others if not other.is_done)

    def _arm(self) -> None:
        """Let a thread of C write the stacks, which runs even where Python holds the interpreter's lock for ever."""
        faulthandler.dump_traceback_later(0.75 * self.settings.silent_after_s, file=self._stacks)

    def _post(self, *, is_done: bool = False) -> None:
        self._count += 1
        progress = (self._step, self._phase, self._progress)
        self._board.post_heartbeat(Heartbeat(self.rank, self._count, *progress, self._process, is_done))

    def _lost(self) -> Stop | None:
        gone, silent = [], []
        for other in self._others:
            other.look(self._board)
            if other.heartbeat is None or other.heartbeat.is_done:
                continue
            if other.heartbeat.process.is_gone:
                other.look(self._board)  # it may have said goodbye since
                if not other.heartbeat.is_done:
                    gone.append(other.rank)
            elif other.silence_s > self.settings.silent_after_s:
                silent.append(other.rank)
        lost = gone or silent
        if not lost:
            return None
        how = "ended without a word (killed?)" if gone else f"sent no heartbeat for {self.settings.silent_after_s:g} s"
        # Its last heartbeat may be older than the step, in which this rank waits for it.
        return Stop(f"rank {', '.join(map(str, lost))} {how}", tuple(lost), self._step, self.rank)

    def _stop_all(self, stop: Stop, code: ExitCode) -> None:
        """Post the stop, unless there is one, and end this process."""
        self._ending.acquire()  # for good: of main thread and watchdog the second waits here until the process ends
        faulthandler.cancel_dump_traceback_later()
        is_first = self._board.post_stop(stop)
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._board.post_stacks_done(self.rank)
        if is_first:
            self._report(stop)
        else:
            code = ExitCode.STALLED if code is ExitCode.STALLED else ExitCode.STOPPED
            self._wait_until(lambda: self._board.has_report, 2 * self.settings.settle_s)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _report(self, stop: Stop) -> None:
        running = [o for o in self._others if o.rank not in stop.ranks]
        self._wait_until(lambda: all(self._board.are_stacks_done(o.rank) for o in running), self.settings.settle_s)
        beats = [beat for r in range(len(self._others) + 1) if (beat := self._board.heartbeat(r)) is not None]
        text = report_text(stop, beats, {beat.rank: _read(self._board.stacks_file(beat.rank)) for beat in beats})
        path = self._board.post_report(text)
        log.error("all ranks stop: %s; the report is %s", stop.cause, path)
        for beat in beats:
            # Who cannot stop by itself: stopped by a signal, or in code that never returns to Python.
            if beat.rank != self.rank and not self._board.are_stacks_done(beat.rank):
                beat.process.kill(signal.SIGKILL)

    @staticmethod
    def _wait_until(condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)


@dataclass
class _Phase:
    """How long a part of a step takes."""

    count: int = 0
    longest_s: float = 0.0

    def took(self, seconds: float) -> None:
        """The first time may have compiled, so the second one replaces it."""
        self.longest_s = seconds if self.count == 1 else max(self.longest_s, seconds)
        self.count += 1

    def allowed_s(self, settings: WatchdogSettings) -> float:
        return max(settings.stall_after_s, 3 * self.longest_s) if self.count else settings.start_s


class _Other:
    """What this rank knows of another, by its own clock: clocks of machines differ."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.heartbeat: Heartbeat | None = None
        self._changed = self._went_on = time.monotonic()

    def look(self, board: Board) -> None:
        before, heartbeat = self.heartbeat, board.heartbeat(self.rank)
        if heartbeat is not None and (before is None or heartbeat.count != before.count):
            self.heartbeat, self._changed = heartbeat, time.monotonic()
            if before is None or heartbeat.progress != before.progress:
                self._went_on = self._changed

    @property
    def silence_s(self) -> float:
        return time.monotonic() - self._changed

    @property
    def is_still_for_s(self) -> float:
        return time.monotonic() - self._went_on

    @property
    def is_done(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.is_done


def _is_of_collective(error: BaseException) -> bool:
    """Whether it came from torch.distributed, or from a backward or module that calls it."""
    frames = traceback.extract_tb(error.__traceback__)
    words = ("gloo", "NCCL", "Connection closed", "Connection reset")
    is_named = any(word.lower() in str(error).lower() for word in words)
    return isinstance(error, dist.DistError) or is_named or any("torch/distributed/" in f.filename for f in frames)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
