"""Who may come in: an engine's unfinished sequences against their limit."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable

from apt_serve.engine.client import EngineOverloadedError, EngineStoppedError

SHARE_OF_FREE_PLACES = 3
"""A tenant may hold this many times the places that are free: one alone fills three quarters, and whoever comes then
still finds room. Dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998."""


class Admission:
    """Counts unfinished sequences, where their number is exact: on the event loop, the only place to use it.

    Args:
        is_fair: keep one tenant from taking every place.
    """

    def __init__(self, *, is_fair: bool = False) -> None:
        self.num_unfinished = 0
        self._is_fair = is_fair
        self._num_of: Counter[str] = Counter()
        """By tenant, where that matters."""
        self._refusal: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._has_finished = asyncio.Event()
        self._finished_at = time.monotonic()
        self._finish_interval_s = 1.0
        """Moving average of the time between two sequences' ends, while there is work."""

    def admit(self, num_sequences: int, capacity: int, tenant: str = "") -> None:
        """Count a request's sequences in, all of them or none.

        Raises:
            EngineStoppedError: ``close`` was called.
            EngineOverloadedError: together with those that run and wait they would be more than ``capacity``, or more
                than the tenant's share of it.
        """
        self.refuse_if_closed()
        num_there, limit, whose = self.num_unfinished, capacity, ""
        num_free = capacity - self.num_unfinished
        if self._is_fair and self._num_of[tenant] and num_free >= num_sequences:
            num_there, whose = self._num_of[tenant], " of yours"
            limit = min(SHARE_OF_FREE_PLACES * (num_free - num_sequences), capacity)
        excess = num_there + num_sequences - limit
        if excess > 0:
            retry_after_s = min(max(math.ceil(excess * self._finish_interval_s), 1), 60)
            raise EngineOverloadedError(
                f"{num_there} generations{whose} are running or waiting, {limit} is the limit; "
                f"try again in {retry_after_s} s.",
                retry_after_s=retry_after_s,
            )
        if not self.num_unfinished:
            self._finished_at = time.monotonic()
        self.num_unfinished += num_sequences
        if self._is_fair:
            self._num_of[tenant] += num_sequences
        self._idle.clear()

    def refuse_if_closed(self) -> None:
        """Raise EngineStoppedError once ``close`` was called."""
        if self._refusal is not None:
            raise EngineStoppedError(self._refusal)

    def finish(self, num_sequences: int = 1, tenant: str = "") -> None:
        """Count sequences of one tenant out that have ended, however they did."""
        now = time.monotonic()
        self._finish_interval_s += 0.1 * (now - self._finished_at - self._finish_interval_s)
        self._finished_at = now
        self.num_unfinished -= num_sequences
        if self._is_fair:
            self._num_of[tenant] -= num_sequences
            if not self._num_of[tenant]:
                del self._num_of[tenant]
        self._has_finished.set()
        if not self.num_unfinished:
            self._idle.set()

    def close(self, refusal: str) -> None:
        """Let nobody in any more, and say why."""
        self._refusal = refusal

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once something holds that can come to hold only when sequences end."""
        while not condition():
            self._has_finished.clear()
            await self._has_finished.wait()

    async def wait_idle(self) -> None:
        """Return once every sequence has ended."""
        await self._idle.wait()
