"""Looks for stop strings in text that arrives in pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a text ends."""

    text: str
    """What of the text not yet passed on lies before the stop string."""
    stop: str


class StopStringMatcher:
    """Passes text on, save for the longest end that could still become a stop string.

    The match that is complete first wins, the longest one if several are complete at once: that does not depend on
    how the text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        # Longest first, so that of several matches with the same end the first one seen is the longest.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._prefixes = frozenset(stop[:size] for stop in stops for size in range(1, len(stop)))
        self._max_held = max(map(len, stops), default=1) - 1
        self._held = ""

    def push(self, text: str, *, counts: bool = True) -> str | StopMatch:
        """The text to pass on, or the match that ends it.

        Args:
            text: the next piece.
            counts: whether a stop string that ends in this piece is a match.
        """
        if not self._stops:
            return text
        pending = self._held + text
        match = self._find(pending, len(self._held)) if counts else None
        if match is not None:
            return match
        self._held = self._possible_start(pending)
        return pending[: len(pending) - len(self._held)]

    def flush(self) -> str:
        """What is held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _find(self, pending: str, num_old: int) -> StopMatch | None:
        """The first match to end behind the old characters, which were searched before."""
        best: StopMatch | None = None
        best_end = len(pending) + 1
        for stop in self._stops:
            start = pending.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0 and start + len(stop) < best_end:
                best, best_end = StopMatch(pending[:start], stop), start + len(stop)
        return best

    def _possible_start(self, pending: str) -> str:
        for size in range(min(self._max_held, len(pending)), 0, -1):
            if pending[-size:] in self._prefixes:
                return pending[-size:]
        return ""
