"""What a run survives: too little memory, by smaller micro-batches, and passing faults of files and networks."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from apt_core.errors import AptError, ConfigError

T = TypeVar("T")
log = logging.getLogger(__name__)

PASSING = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE}
)
"""Error numbers that may go away by themselves; a missing file, a full disk or no permission do not."""


@dataclass(frozen=True)
class RecoverySettings:
    """How much a run puts up with."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    max_parts: int = 64
    """A micro-batch that does not fit in memory is divided into at most so many parts."""
    io_attempts: int = 6
    """How often a file is tried altogether."""
    io_first_wait_s: float = 0.5
    """The first wait is at most this long; each further one up to twice as long, at random."""
    io_longest_wait_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_parts", "io_attempts"):
            if getattr(self, name) < 1:
                raise ConfigError("must be at least 1", field=name)


class RestartNeededError(AptError):
    """Memory ran out where other ranks wait for this one: the job must restart from its checkpoint.

    The smaller micro-batch is on disk by then, so that the restarted job begins with it.
    """


class OutOfMemoryRecovery:
    """Runs steps with micro-batches divided into as many parts as memory asks for; the global batch stays the same.

    Args:
        file: keeps the number of parts for a restart; all ranks read it, so it must be on a disk they share.
        has_collectives: whether a step meets other ranks: then one rank cannot try again alone.
        note: told of each error that is recovered from; it must not keep the error, whose frames hold tensors.
    """

    def __init__(
        self,
        settings: RecoverySettings,
        file: Path,
        *,
        has_collectives: bool,
        note: Callable[[RuntimeError], object] = lambda error: None,
    ) -> None:
        self._settings, self._file, self._has_collectives = settings, file, has_collectives
        self._note = note
        self.num_parts = _read_parts(file)

    def run(self, attempt: Callable[[int], T]) -> T:
        """Call ``attempt(num_parts)`` until it fits in memory.

        It must begin by clearing gradients, go forward and backward over every micro-batch in ``num_parts`` parts, and
        divide each part's loss by the scored tokens of the whole step: the gradient is then the same for any number.

        Raises:
            RestartNeededError: the step meets other ranks.
            torch.OutOfMemoryError: not even ``max_parts`` parts fit.
        """
        while True:
            try:
                return attempt(self.num_parts)
            except RuntimeError as error:
                if not is_out_of_memory(error) or 2 * self.num_parts > self._settings.max_parts:
                    raise
                self._divide_further(error)
                if not self._has_collectives:
                    self._note(error)
                else:
                    message = f"out of memory; after the restart a micro-batch has {self.num_parts} parts"
                    raise RestartNeededError(message) from error
            # The error is gone here, and with it the frames that held the failed attempt's tensors.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _divide_further(self, error: RuntimeError) -> None:
        self.num_parts *= 2
        # As text: a handler that keeps the error would keep the attempt's tensors.
        log.warning("out of memory, a micro-batch has %d parts from now on: %s", self.num_parts, str(error))
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"num_parts": self.num_parts}), encoding="utf-8")
        temporary.replace(self._file)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or, by its allocator's words, the processor had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def is_passing(error: BaseException) -> bool:
    """Whether the same call may work in a while."""
    return isinstance(error, TimeoutError | ConnectionError) or (isinstance(error, OSError) and error.errno in PASSING)


def with_backoff(
    call: Callable[[], T],
    settings: RecoverySettings,
    what: str,
    *,
    note: Callable[[BaseException], object] = lambda error: None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until no passing fault comes, with ever longer waits; ``what`` names the call in the log.

    Args:
        note: told of each fault that is not the last.
        sleep: waits so many seconds.

    Raises:
        OSError: the fault does not pass, or ``io_attempts`` calls have failed: the last one's.
    """

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        log.warning("%s failed, again in %.1f s: %s", what, state.next_action.sleep, error)
        note(error)

    retrying = Retrying(
        retry=retry_if_exception(is_passing),
        wait=wait_random_exponential(settings.io_first_wait_s, settings.io_longest_wait_s),
        stop=stop_after_attempt(settings.io_attempts),
        before_sleep=tell,
        sleep=sleep,
        reraise=True,
    )
    return retrying(call)


def _read_parts(file: Path) -> int:
    try:
        return max(int(json.loads(file.read_text(encoding="utf-8"))["num_parts"]), 1)
    except FileNotFoundError:
        return 1
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"is damaged ({error}); delete it to start over", field=str(file)) from None
