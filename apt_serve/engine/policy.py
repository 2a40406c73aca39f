"""In which order sequences are served, and which one gives way when memory is short. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Protocol

from apt_serve.engine.sequence import Sequence

Rank = tuple[float, ...]
"""Lower is served earlier."""


class Policy(Protocol):
    """An order of sequences. Whoever ranks last among those that run is the victim of a preemption.

    One order decides both, so that a step which serves sequences in this order never takes back what it has given.
    """

    def rank(self, seq: Sequence) -> Rank:
        """The sequence's place; does not change while the scheduler has it."""

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence is served before a running one, and may preempt it.

        Only ever true if ``waiting`` ranks before ``running``.
        """


class FCFS:
    """First come, first served. A newcomer never preempts."""

    def rank(self, seq: Sequence) -> Rank:
        """By arrival, then by choice."""
        return (seq.arrival_time, seq.arrival_order, seq.index)

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """Never."""
        return False


class Priority:
    """Lower numbers first, then by arrival. A sequence with a strictly lower number may preempt."""

    def rank(self, seq: Sequence) -> Rank:
        """By priority, then by arrival, then by choice."""
        return (seq.priority, seq.arrival_time, seq.arrival_order, seq.index)

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """If its number is strictly lower; equals never displace each other."""
        return waiting.priority < running.priority


_POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FCFS, "priority": Priority}


def make_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()


class WaitingQueue:
    """Waiting sequences by rank. ``push``, ``pop`` and ``discard`` cost O(log n), amortised."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
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
        heapq.heappush(self._heap, (self._policy.rank(seq), ticket, seq))

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
