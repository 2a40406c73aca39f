"""In which order sequences are served, and which one gives way when memory is short. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from apt_serve.engine.fairness import FairQueue
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.waiting_queue import Rank, RankedQueue, WaitingQueue


class Policy(Protocol):
    """An order of sequences. Whoever ranks last among those that run is the victim of a preemption.

    One order decides both, so that a step which serves sequences in this order never takes back what it has given.
    """

    def make_queue(self) -> WaitingQueue:
        """Where sequences wait, an empty one."""

    def rank(self, seq: Sequence) -> Rank:
        """The sequence's place among those that run; does not change while it does."""

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence is served before a running one, and may preempt it.

        Only ever true if ``waiting`` ranks before ``running``.
        """


class FCFS:
    """First come, first served. A newcomer never preempts."""

    def make_queue(self) -> WaitingQueue:
        """By rank."""
        return RankedQueue(self.rank)

    def rank(self, seq: Sequence) -> Rank:
        """By arrival, then by choice."""
        return (seq.arrival_time, seq.arrival_order, seq.index)

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """Never."""
        return False


class Priority:
    """Lower numbers first, then by arrival. A sequence with a strictly lower number may preempt."""

    def make_queue(self) -> WaitingQueue:
        """By rank."""
        return RankedQueue(self.rank)

    def rank(self, seq: Sequence) -> Rank:
        """By priority, then by arrival, then by choice."""
        return (seq.priority, seq.arrival_time, seq.arrival_order, seq.index)

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """If its number is strictly lower; equals never displace each other."""
        return waiting.priority < running.priority


class Fair:
    """Tenants share tokens: next is one of the tenant that has been served least (``fairness``). None preempts.

    Those that run rank by when they were first chosen, lest a tenant's long wait cost it what it was given at last.
    """

    def make_queue(self) -> WaitingQueue:
        """By tenant."""
        return FairQueue()

    def rank(self, seq: Sequence) -> Rank:
        """By when it was first chosen."""
        return (seq.turn,)

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        """Never."""
        return False


_POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FCFS, "priority": Priority, "fair": Fair}


def make_policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
