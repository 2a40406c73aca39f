"""Callers that wait for one model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from apt_core.errors import AptError
from apt_serve.models.slots import Lease, Slot, Slots


@dataclass(eq=False)
class Demand:
    """Callers that wait for one model, and the one task that gets it for them."""

    name: str
    waiters: set[asyncio.Future[Lease]] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    is_loading: bool = False
    """Room is reserved: it goes on even if all its callers leave."""

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody is left whom its task would do anything for."""
        return not self.waiters and not self.is_loading

    async def wait(self) -> Lease:
        """A lease once there is one; a caller that is cancelled at that moment loses none."""
        waiter: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.waiters.add(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                waiter.result().release()
            raise
        finally:
            self.waiters.discard(waiter)

    def grant(self, slots: Slots, slot: Slot) -> None:
        """A lease for each waiter."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(Lease(slots, slot))

    def fail(self, error: AptError) -> None:
        """The same error for each."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # counts as retrieved, also if its caller has just left
