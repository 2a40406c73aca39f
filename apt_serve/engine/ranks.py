"""Rank 0's view of the other ranks: it starts their processes, watches them, and says what became of them."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize

from apt_core.parallel import CollectiveError, Communicator, connect, listen
from apt_serve.engine.executor import EngineBrokenError
from apt_serve.engine.rank_worker import Build, Failed, Order, Phase, Place, Whereabouts, work

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
"""At most so long until an overdue step is noticed; a report or a death is noticed at once."""
SETTLE_S = 0.3
"""After the first sign of a failure, the time for other ranks' accounts of it."""
STOP_S = 5.0
"""Workers told to stop have so long before they are killed."""


@dataclass(slots=True)
class _Worker:
    rank: int
    process: SpawnProcess
    steps: connection.Connection
    channel: connection.Connection
    phase: Phase = Phase.STARTED
    failure: str | None = None
    """Its traceback."""
    whereabouts: str | None = None
    """Where it was when it was asked."""

    @classmethod
    def start(cls, place: Place, build: Build) -> _Worker:
        context = multiprocessing.get_context("spawn")
        steps, steps_there = context.Pipe()
        channel, channel_there = context.Pipe()
        process = context.Process(
            target=work, args=(place, build, steps_there, channel_there), name=f"apt-rank-{place.rank}", daemon=True
        )
        process.start()
        steps_there.close()
        channel_there.close()
        return cls(place.rank, process, steps, channel)

    def take_reports(self) -> None:
        try:
            while self.channel.poll():
                match self.channel.recv():
                    case Phase() as phase:
                        self.phase = phase
                    case Failed(text):
                        self.failure = text
                    case Whereabouts(text):
                        self.whereabouts = text
        except (EOFError, OSError):  # it has ended, as its exit code will tell
            pass

    @property
    def has_failed(self) -> bool:
        return self.failure is not None or not self.process.is_alive()

    def account(self) -> str:
        """What became of it."""
        code = self.process.exitcode
        if self.failure is not None:
            return f"rank {self.rank} failed:\n{self.failure}"
        if code is not None and code < 0:
            return f"rank {self.rank} (process {self.process.pid}) was killed by {signal.Signals(-code).name}"
        if code is not None:
            return f"rank {self.rank} (process {self.process.pid}) ended with exit code {code}"
        where = f"is here:\n{self.whereabouts}" if self.whereabouts else "does not answer"
        return f"rank {self.rank} (process {self.process.pid}) {where}"


class Ranks:
    """The processes of ranks 1 and up, and what this one, rank 0, does with them.

    A worker that fails or ends, or a step that takes too long, ends all workers: collectives of rank 0 then fail
    instead of waiting for ever, and every later call raises EngineBrokenError with an account of what happened.

    Args:
        build: what each worker calls to load its part.
        size: number of ranks.
        device_type: cpu or cuda.
        stall_timeout_s: the longest a step may take.
    """

    def __init__(self, build: Build, *, size: int, device_type: str, stall_timeout_s: float) -> None:
        self._size, self._device_type, self._stall_timeout_s = size, device_type, stall_timeout_s
        self._listener = listen()
        self._port = self._listener.getsockname()[1]
        self._communicator: Communicator | None = None
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._is_stopping = False
        self._busy_since: float | None = None
        self._workers = [_Worker.start(Place(r, size, device_type, self._port), build) for r in range(1, size)]
        # Before multiprocessing would wait for its processes at the interpreter's exit.
        self._at_exit = Finalize(None, self.stop, kwargs={"patience_s": 0}, exitpriority=10)
        self._watch = threading.Thread(target=self._watch_over, name="apt-ranks", daemon=True)
        self._watch.start()

    @contextmanager
    def joined(self) -> Iterator[Communicator]:
        """For rank 0 to load its own part in; left when all ranks have loaded theirs. An error ends them.

        Raises:
            EngineBrokenError: another rank could not load its part; it says why.
        """
        try:
            yield self._connect()
            self._wait_for(Phase.READY)
        except CollectiveError as error:
            broken = self.broken(error)
            self.stop()
            raise broken from error
        except BaseException:
            self.stop(patience_s=0)
            raise

    def _connect(self) -> Communicator:
        self._wait_for(Phase.CONNECTING)
        device = Place(0, self._size, self._device_type, self._port).device()
        self._communicator = connect(0, self._size, device, self._port, self._listener)
        return self._communicator

    def send(self, order: Order) -> None:
        """Let all run a step."""
        if self._failure is not None:
            raise EngineBrokenError(self._failure)
        if self._busy_since is None:
            self._busy_since = time.monotonic()
        message = ForkingPickler.dumps(order)
        for worker in self._workers:
            worker.steps.send_bytes(message)

    def note_progress(self, *, is_idle: bool) -> None:
        """A step has completed; whether none is under way now."""
        self._busy_since = None if is_idle else time.monotonic()

    def broken(self, error: Exception) -> EngineBrokenError:
        """What to raise for an error of rank 0, which leaves the ranks out of step: they are ended."""
        if isinstance(error, CollectiveError | OSError):  # another rank's end, which is about to be noticed
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None, timeout=10 * SETTLE_S)
        self._fail(f"rank 0 failed: {type(error).__name__}: {error}")
        assert self._failure is not None
        return EngineBrokenError(self._failure)

    @property
    def is_alive(self) -> bool:
        """Whether all ranks are well, as far as is known."""
        return self._failure is None and not self._is_stopping

    def stop(self, patience_s: float = STOP_S) -> None:
        """End all workers, by force after a while; returns when their processes have ended."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._at_exit.cancel()
        for worker in self._workers:
            with suppress(OSError):
                worker.steps.send(None)
        self._watch.join()
        deadline = time.monotonic() + patience_s
        for worker in self._workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
        self._kill()
        for worker in self._workers:
            worker.process.join()
            worker.steps.close()
            worker.channel.close()
        self._listener.close()

    def _wait_for(self, phase: Phase) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or all(w.phase >= phase for w in self._workers))
        if self._failure is not None:
            raise EngineBrokenError(self._failure)

    def _fail(self, account: str) -> None:
        """End all workers, for this reason if there is none yet."""
        with self._changed:
            if self._failure is None:
                self._failure = account
                log.error("tensor parallelism has failed: %s", account)
            self._changed.notify_all()
        self._kill()
        if self._communicator is not None:
            self._communicator.abort()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()

    # The rest runs on the watch's thread.

    def _watch_over(self) -> None:
        watched = [each for worker in self._workers for each in (worker.channel, worker.process.sentinel)]
        while not self._is_stopping:
            connection.wait(watched, timeout=WATCH_INTERVAL_S)
            if self._is_stopping:
                return
            self._take_reports()
            if any(worker.has_failed for worker in self._workers):
                time.sleep(SETTLE_S)
                self._take_reports()
                self._fail("\n".join(worker.account() for worker in self._workers if worker.has_failed))
                return
            if self._is_overdue():
                self._fail(self._account_of_stall())
                return

    def _take_reports(self) -> None:
        with self._changed:
            for worker in self._workers:
                worker.take_reports()
            self._changed.notify_all()

    def _is_overdue(self) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since > self._stall_timeout_s

    def _account_of_stall(self) -> str:
        for worker in self._workers:
            with suppress(OSError):
                worker.channel.send(None)
        time.sleep(SETTLE_S)
        self._take_reports()
        accounts = "\n".join(worker.account() for worker in self._workers)
        return f"a step has taken longer than stall_timeout_s ({self._stall_timeout_s} s):\n{accounts}"
