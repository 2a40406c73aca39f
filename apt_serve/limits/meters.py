"""What is counted: amounts in the last minute, and leases of what runs. In one process; redis_meters.py is the twin.

A meter is a sliding window of bins of half a second: what was taken counts for 60 to 60.5 seconds, so no 60 seconds
ever see more than the limit. The bin of an admission is remembered, hence what it did not use goes back to exactly
where it was taken from, or nowhere once that has left the window.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

NUM_BINS = 120
BIN_MS = 500
"""Together a minute. Finer bins would hold less back but cost more to add up."""


@dataclass(frozen=True, slots=True)
class Take:
    """An amount wanted of a meter."""

    key: str
    limit: int
    """Most in a minute."""
    amount: int


@dataclass(frozen=True, slots=True)
class Seat:
    """A lease wanted among those of a key."""

    key: str
    limit: int
    """Most at a time."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one admission takes: all of it, or nothing."""

    lease: str
    """Unique name of the admission."""
    takes: tuple[Take, ...] = ()
    seats: tuple[Seat, ...] = ()


@dataclass(frozen=True, slots=True)
class Level:
    """Where a meter stands."""

    remaining: int
    reset_ms: int
    """Until it is untouched again, if nobody takes more."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a demand."""

    levels: tuple[Level, ...]
    """Of each take's meter, afterwards."""
    bins: tuple[int, ...]
    """Of each take, where a refund goes."""
    refused: int | None = None
    """The first that did not fit, counted over takes and then seats; None: admitted."""
    retry_ms: int | None = None
    """When a refused amount would fit; None: never, or nobody knows."""

    @property
    def is_admitted(self) -> bool:
        """Whether all was taken."""
        return self.refused is None


@dataclass(frozen=True, slots=True)
class Refund:
    """What an admission gives back when it ends."""

    lease: str
    takes: tuple[tuple[str, int, int], ...]
    """Of each meter: key, bin, amount."""
    seats: tuple[str, ...]


@dataclass(slots=True)
class _Window:
    bins: dict[int, int] = field(default_factory=dict)
    """Amount by number of the bin, oldest first."""
    used: int = 0

    def advance(self, now: int) -> int:
        """Forget what has left the window; returns the bin that counts as now."""
        newest = next(reversed(self.bins), now)
        if newest > now + NUM_BINS:  # the clock was set far back: better to begin anew than to refuse until then
            self.bins.clear()
            self.used, newest = 0, now
        now = max(now, newest)
        while self.bins and (oldest := next(iter(self.bins))) < now - NUM_BINS:
            self.used -= self.bins.pop(oldest)
        return now

    def fits_after_ms(self, excess: int, now_ms: int) -> int | None:
        """When so much will have left the window."""
        for number, amount in self.bins.items():
            excess -= amount
            if excess <= 0:
                return _leaves_ms(number) - now_ms
        return None


class MemoryMeters:
    """Meters and leases of this process. Every call is atomic: nothing in it waits.

    Args:
        clock: seconds; may jump.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        """Least recently taken from first."""
        self._leases: dict[str, set[str]] = {}

    def take(self, demand: Demand) -> Verdict:
        """Take all that is demanded, or nothing."""
        now_ms = int(self._clock() * 1000)
        windows = [self._window(take.key) for take in demand.takes]
        bins = tuple(window.advance(now_ms // BIN_MS) for window in windows)
        refused, retry_ms = self._first_refused(demand, windows, now_ms)
        if refused is None:
            for window, number, take in zip(windows, bins, demand.takes, strict=True):
                window.bins[number] = window.bins.get(number, 0) + take.amount
                window.used += take.amount
            for seat in demand.seats:
                self._leases.setdefault(seat.key, set()).add(demand.lease)
        levels = tuple(_level(take, window, now_ms) for take, window in zip(demand.takes, windows, strict=True))
        self._forget_idle(now_ms // BIN_MS)
        return Verdict(levels, bins, refused, retry_ms)

    def give_back(self, refund: Refund) -> None:
        """Return what was not used, and the seats."""
        for key, number, amount in refund.takes:
            window = self._windows.get(key)
            if window is not None and number in window.bins:
                returned = min(amount, window.bins[number])
                window.bins[number] -= returned
                window.used -= returned
                if not window.bins[number]:
                    del window.bins[number]
        for key in refund.seats:
            leases = self._leases.get(key, set())
            leases.discard(refund.lease)
            if not leases:
                self._leases.pop(key, None)

    def _first_refused(self, demand: Demand, windows: list[_Window], now_ms: int) -> tuple[int | None, int | None]:
        for i, (take, window) in enumerate(zip(demand.takes, windows, strict=True)):
            excess = window.used + take.amount - take.limit
            if excess > 0:
                return i, window.fits_after_ms(excess, now_ms)
        for i, seat in enumerate(demand.seats):
            if len(self._leases.get(seat.key, ())) >= seat.limit:
                return len(windows) + i, None
        return None, None

    def _window(self, key: str) -> _Window:
        window = self._windows.setdefault(key, _Window())
        self._windows.move_to_end(key)
        return window

    def _forget_idle(self, now: int) -> None:
        """Two of the longest untouched a call: faster than new ones come."""
        for _ in range(2):
            key, window = next(iter(self._windows.items()), (None, None))
            if key is None or window is None or window.advance(now) > now or window.bins:
                return
            del self._windows[key]


def _level(take: Take, window: _Window, now_ms: int) -> Level:
    newest = next(reversed(window.bins), None)
    reset_ms = 0 if newest is None or not window.used else _leaves_ms(newest) - now_ms
    return Level(max(0, take.limit - window.used), reset_ms)


def _leaves_ms(number: int) -> int:
    return (number + NUM_BINS + 1) * BIN_MS
