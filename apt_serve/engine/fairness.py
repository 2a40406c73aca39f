"""Sharing among tenants: the virtual token counter (arXiv 2401.00588, algorithm 2). No torch.

Each tenant has a counter of the tokens it was given, and next is a waiting sequence of the tenant with the lowest. A
tenant that comes with nothing waiting has its counter lifted to the lowest of those that wait: what it did not use
before it cannot claim now. So of two tenants that always have something waiting neither is ever ahead by more than a
bound that does not grow with time, and while nobody else waits one may have it all.

As in the paper a prompt is charged when its sequence is first chosen, so that the next choice knows of it, and output
as it is made. What the prefix cache supplied costs nothing, nor does computing anew what a preemption took.
"""

from __future__ import annotations

from itertools import count

from apt_serve.engine.sequence import Sequence
from apt_serve.engine.waiting_queue import Rank, RankedQueue

PROMPT_WEIGHT = 1
"""What a token of a prompt counts."""
OUTPUT_WEIGHT = 2
"""What a token of output counts; both are the paper's."""
MAX_COUNTERS = 4096
"""Beyond it, counters of tenants with nothing waiting are forgotten where that changes nothing."""


class FairQueue:
    """Waiting sequences by tenant. A call costs O(tenants that wait), and O(log n) in a tenant's sequences."""

    def __init__(self) -> None:
        self._queues: dict[str, RankedQueue] = {}
        """Of the tenants that wait."""
        self._counters: dict[str, int] = {}
        """Never fall."""
        self._chosen_at: dict[str, int] = {}
        """Turn at which a tenant that waits was chosen last: of equals, who has not been chosen for longer is next."""
        self._turns = count(1)
        self._last_to_wait: str | None = None
        """The tenant whose last sequence was the last to leave."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __contains__(self, seq: Sequence) -> bool:
        return seq.tenant in self._queues and seq in self._queues[seq.tenant]

    def push(self, seq: Sequence) -> None:
        """See WaitingQueue."""
        tenant = seq.tenant
        if tenant not in self._queues:
            self._counters[tenant] = max(self._counters.get(tenant, 0), self._floor())
            self._queues[tenant] = RankedQueue(_rank_within_tenant)
            self._chosen_at[tenant] = 0
            if len(self._counters) > MAX_COUNTERS:
                self._forget_counters()
        self._queues[tenant].push(seq)

    def peek(self) -> Sequence | None:
        """See WaitingQueue."""
        return self._queues[self._next_tenant()].peek() if self._queues else None

    def pop(self) -> Sequence:
        """See WaitingQueue."""
        tenant = self._next_tenant()
        seq = self._queues[tenant].pop()
        turn = next(self._turns)
        if not seq.turn:
            seq.turn = turn
        self._chosen_at[tenant] = turn
        self._drop_if_empty(tenant)
        return seq

    def discard(self, seq: Sequence) -> None:
        """See WaitingQueue."""
        self._queues[seq.tenant].discard(seq)
        self._drop_if_empty(seq.tenant)

    def charge(self, seq: Sequence, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """See WaitingQueue."""
        cost = PROMPT_WEIGHT * num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens
        self._counters[seq.tenant] = self._counters.get(seq.tenant, 0) + cost

    def _next_tenant(self) -> str:
        return min(self._queues, key=lambda tenant: (self._counters[tenant], self._chosen_at[tenant]))

    def _floor(self) -> int:
        """What a newcomer's counter is lifted to."""
        if self._queues:
            return min(self._counters[tenant] for tenant in self._queues)
        return self._counters[self._last_to_wait] if self._last_to_wait is not None else 0

    def _drop_if_empty(self, tenant: str) -> None:
        if not self._queues[tenant]:
            del self._queues[tenant], self._chosen_at[tenant]
            self._last_to_wait = tenant

    def _forget_counters(self) -> None:
        """Those that a lift would replace anyhow."""
        floor = self._floor()
        self._counters = {
            tenant: counter
            for tenant, counter in self._counters.items()
            if counter > floor or tenant in self._queues or tenant == self._last_to_wait
        }


def _rank_within_tenant(seq: Sequence) -> Rank:
    """Those that were preempted first, then by arrival."""
    return (not seq.turn, seq.turn, seq.arrival_time, seq.arrival_order, seq.index)
