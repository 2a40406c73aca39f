"""Sequences that wait for a place in a step. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Protocol

from apt_serve.engine.sequence import Sequence

Rank = tuple[float, ...]
"""Lower is served earlier."""


class WaitingQueue(Protocol):
    """Sequences that wait, new or preempted, and which of them is next."""

    def __len__(self) -> int: ...

    def __contains__(self, seq: Sequence) -> bool: ...

    def push(self, seq: Sequence) -> None:
        """Let a sequence wait."""

    def peek(self) -> Sequence | None:
        """The sequence that is next, if any waits."""

    def pop(self) -> Sequence:
        """Take the sequence that is next."""

    def discard(self, seq: Sequence) -> None:
        """Forget a sequence that waits no longer."""

    def charge(self, seq: Sequence, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Take note of what a sequence that was popped has been given."""


class RankedQueue:
    """Waiting sequences by rank. ``push``, ``pop`` and ``discard`` cost O(log n), amortised."""

    def __init__(self, rank: Callable[[Sequence], Rank]) -> None:
        self._rank = rank
        self._heap: list[tuple[Rank, int, Sequence]] = []
        self._ticket_of: dict[Sequence, int] = {}
        """Of each waiting sequence; heap entries with another ticket are leftovers of discarded ones."""
        self._tickets = count()

    def __len__(self) -> int:
        return len(self._ticket_of)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._ticket_of

    def push(self, seq: Sequence) -> None:
        """Let a sequence wait."""
        assert seq not in self._ticket_of
        ticket = next(self._tickets)
        self._ticket_of[seq] = ticket
        heapq.heappush(self._heap, (self._rank(seq), ticket, seq))

    def peek(self) -> Sequence | None:
        """The sequence that is next, if any waits."""
        while self._heap:
            _, ticket, seq = self._heap[0]
            if self._ticket_of.get(seq) == ticket:
                return seq
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """Take the sequence that is next."""
        seq = self.peek()
        assert seq is not None
        heapq.heappop(self._heap)
        del self._ticket_of[seq]
        return seq

    def discard(self, seq: Sequence) -> None:
        """Forget a sequence that waits no longer."""
        del self._ticket_of[seq]
        # Its entry stays in the heap until it surfaces; rebuilding at twice the size keeps leftovers bounded.
        if len(self._heap) > 2 * len(self._ticket_of) + 16:
            self._heap = [entry for entry in self._heap if self._ticket_of.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def charge(self, seq: Sequence, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """See WaitingQueue: it is all one to this queue."""
