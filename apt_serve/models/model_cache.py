"""Models that are loaded when they are asked for, and stopped when others need their room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

from apt_serve.engine.client import EngineStoppedError
from apt_serve.models.demand import Demand
from apt_serve.models.errors import (
    GIB,
    ModelBusyError,
    ModelInUseError,
    ModelLoadError,
    ModelTooLargeError,
    load_errors,
)
from apt_serve.models.ports import CacheEvents, ModelLoader, NoEvents
from apt_serve.models.slots import Lease, Phase, Slot, Slots

log = logging.getLogger(__name__)


class ModelCache:
    """At most ``max_models`` started engines, within a budget of memory.

    A model is loaded once however many ask for it, the least recently used one makes room, and none is stopped while
    somebody holds a lease on it. Who waits for room is served in turn; after half of ``wait_s`` the least recently used
    models give no new leases, so that nobody waits for ever behind a stream of requests for what is loaded.

    Args:
        loader: makes and stops engines.
        max_models: loaded, being loaded or being stopped at a time.
        max_bytes: that these may take together.
        wait_s: how long ``get_model`` waits for room and for the load.
        max_waiting: callers that may wait at a time.
        events: told of loads and evictions.
    """

    def __init__(
        self,
        loader: ModelLoader,
        *,
        max_models: int = 3,
        max_bytes: int,
        wait_s: float = 30.0,
        max_waiting: int = 512,
        events: CacheEvents | None = None,
    ) -> None:
        self._loader = loader
        self._slots = Slots(max_models, max_bytes, on_release=self._changed)
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._events = events or NoEvents()
        self._demands: dict[str, Demand] = {}
        self._turns: deque[Demand] = deque()
        """Demands that need room, the first to be served first."""
        self._errors: dict[str, str] = {}
        """Why the latest load of a model failed, if it did."""
        self._stopping: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._grace_s: float | None = None
        """Set by ``stop``: how long what runs may go on."""

    async def get_model(self, name: str) -> Lease:
        """A model, loaded if need be, that stays until its lease is released.

        Raises:
            ModelLoadError: it cannot be loaded.
            ModelBusyError: not within ``wait_s``, or too many wait already. A load that has begun goes on.
            EngineStoppedError: the cache is stopping.
        """
        lease = self.try_get_model(name)
        if lease is not None:
            return lease
        if sum(len(demand.waiters) for demand in self._demands.values()) >= self._max_waiting:
            raise ModelBusyError(f"{self._max_waiting} requests wait for models already.", retry_after_s=1.0)
        try:
            async with asyncio.timeout(self._wait_s):
                return await self._wait_for(name)
        except TimeoutError:
            message = f"The model {name!r} was not ready within {self._wait_s:g} s: other models are in use."
            slot = self._slots.get(name)
            if slot is not None and slot.phase is Phase.LOADING:
                message = f"The model {name!r} is being loaded, which takes longer than {self._wait_s:g} s."
            raise ModelBusyError(message, retry_after_s=max(self._wait_s / 4, 1.0)) from None

    def try_get_model(self, name: str) -> Lease | None:
        """A model that is loaded and gives leases now, or None. One whose engine has died is stopped instead.

        Raises:
            EngineStoppedError: the cache is stopping.
        """
        if self._grace_s is not None:
            raise EngineStoppedError("The server is shutting down.")
        slot = self._slots.get(name)
        if slot is None or slot.phase is not Phase.READY or slot.closed_for is not None:
            return None
        assert slot.engine is not None
        if not slot.engine.stats().is_alive:
            log.error("the engine of %s has died; it is loaded anew when it is asked for", name)
            self._stop_slot(slot, is_evicted=False)
            return None
        return Lease(self._slots, slot)

    async def load(self, name: str) -> None:
        """Load a model if it is not loaded; as ``get_model``, but it waits as long as it takes."""
        lease = self.try_get_model(name) or await self._wait_for(name)
        lease.release()

    async def preload_models(self, names: Sequence[str]) -> None:
        """Load several models side by side.

        Raises:
            ModelLoadError: one of them cannot be loaded, or they do not fit beside each other.
        """
        needs = {name: await self._memory_need(name) for name in names}
        total, most = sum(needs.values()), self._slots.max_bytes
        if total > most or len(needs) > self._slots.max_models:
            raise ModelTooLargeError(
                ", ".join(needs),
                f"together they need {total / GIB:.2f} GiB and {len(needs)} places; there are {most / GIB:.2f} GiB "
                f"and {self._slots.max_models}",
            )
        await asyncio.gather(*map(self.load, needs))

    async def unload(self, name: str) -> None:
        """Stop a model; does nothing if it is not loaded.

        Raises:
            ModelInUseError: requests run on it or wait for it.
        """
        slot = self._slots.get(name)
        if name in self._demands or (slot is not None and slot.num_leases):
            raise ModelInUseError(f"The model {name!r} is in use.")
        if slot is None:
            return
        if slot.phase is Phase.READY:
            self._stop_slot(slot, is_evicted=False)
        while self._slots.get(name) is slot:
            await self._change.wait()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Give no new leases; stop all models side by side, each within its grace period. May be called again.

        A load that has not ended by then is left to itself.
        """
        if self._grace_s is None:
            self._grace_s = grace_s
            for demand in list(self._demands.values()):
                demand.fail(EngineStoppedError("The server is shutting down."))
                if not demand.is_loading and demand.task is not None:
                    self._forget(demand)
                    demand.task.cancel()
            for slot in self._slots.all():
                if slot.phase is Phase.READY:
                    self._stop_slot(slot, is_evicted=False)
        loads = [demand.task for demand in self._demands.values() if demand.task is not None]
        if loads:
            await asyncio.wait(loads, timeout=grace_s)
        if self._stopping:
            await asyncio.wait(self._stopping)

    def slot(self, name: str) -> Slot | None:
        """A model's room, to be read, not changed; None if it takes up none."""
        return self._slots.get(name)

    def slots(self) -> list[Slot]:
        """The room of all that take up any, the least recently used first."""
        return self._slots.all()

    def error(self, name: str) -> str | None:
        """Why the latest load of a model failed; None if it did not."""
        return self._errors.get(name)

    def num_waiting(self, name: str) -> int:
        """Callers that wait for a model."""
        demand = self._demands.get(name)
        return 0 if demand is None else len(demand.waiters)

    async def _wait_for(self, name: str) -> Lease:
        demand = self._demands.get(name)
        if demand is None:
            demand = self._demands[name] = Demand(name)
            demand.task = asyncio.create_task(self._satisfy(demand))
        try:
            return await demand.wait()
        finally:
            if demand.is_abandoned and demand.task is not None:
                self._forget(demand)  # at once: who asks from now on gets a task of its own
                demand.task.cancel()

    async def _satisfy(self, demand: Demand) -> None:
        """The task of a demand: room, load, a lease for each waiter; or the same error for each."""
        try:
            slot = await self._loaded_slot(demand)
        except ModelLoadError as error:
            log.error("%s", error)
            self._errors[demand.name] = error.reason
            self._events.model_load_failed(demand.name)
            demand.fail(error)
        else:
            demand.grant(self._slots, slot)
            if self._grace_s is not None:
                self._stop_slot(slot, is_evicted=False)
        finally:
            self._forget(demand)

    def _forget(self, demand: Demand) -> None:
        if self._demands.get(demand.name) is demand:
            del self._demands[demand.name]
        self._changed()

    async def _loaded_slot(self, demand: Demand) -> Slot:
        """A ready slot: one that was closed for somebody who has left, or a new one."""
        name = demand.name
        num_bytes = await self._memory_need(name)
        slot = await self._room_for(demand, num_bytes)
        if slot.phase is Phase.READY:
            return slot
        demand.is_loading = True
        began = time.monotonic()
        try:
            with load_errors(name):
                slot.engine = await self._loader.load(name)
        except BaseException:
            self._slots.give_back(slot)
            raise
        slot.phase = Phase.READY
        self._errors.pop(name, None)
        self._events.model_loaded(name, slot.engine, time.monotonic() - began)
        return slot

    async def _memory_need(self, name: str) -> int:
        with load_errors(name):
            num_bytes = await self._loader.memory_need(name)
        most = self._slots.max_bytes
        if num_bytes > most:
            raise ModelTooLargeError.alone(name, num_bytes, most)
        return num_bytes

    async def _room_for(self, demand: Demand, num_bytes: int) -> Slot:
        """Wait for a demand's turn and for room, and stop what is idle for it; a slot that is reserved, or is ready."""
        loop = asyncio.get_running_loop()
        patient_until = loop.time() + self._wait_s / 2
        self._turns.append(demand)
        try:
            while True:
                if self._turns[0] is demand:
                    slot = self._try_to_get_room(demand, num_bytes, is_patient=loop.time() < patient_until)
                    if slot is not None:
                        return slot
                try:
                    async with asyncio.timeout_at(patient_until if loop.time() < patient_until else None):
                        await self._change.wait()
                except TimeoutError:
                    continue
        finally:
            self._turns.remove(demand)
            for slot in self._slots.all():
                if slot.closed_for is demand:
                    slot.closed_for = None
            self._changed()

    def _try_to_get_room(self, demand: Demand, num_bytes: int, *, is_patient: bool) -> Slot | None:
        there = self._slots.get(demand.name)
        if there is not None:
            return there if there.phase is Phase.READY else None  # else it is on its way out
        if self._slots.has_room(num_bytes, without=[]):
            return self._slots.take(demand.name, num_bytes)
        idle = [slot for slot in self._slots.all() if slot.is_idle]
        for slot in self._slots.victims(num_bytes, idle) or ():
            self._stop_slot(slot, is_evicted=True)
        if not is_patient:
            ready = [slot for slot in self._slots.all() if slot.phase is Phase.READY]
            for slot in self._slots.victims(num_bytes, ready) or ():
                slot.closed_for = demand
        return None

    def _stop_slot(self, slot: Slot, *, is_evicted: bool) -> None:
        slot.phase = Phase.STOPPING
        self._events.model_unloaded(slot.name, is_evicted=is_evicted)
        task = asyncio.create_task(self._end(slot))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _end(self, slot: Slot) -> None:
        engine, slot.engine = slot.engine, None
        assert engine is not None
        try:
            await self._loader.stop(slot.name, engine, self._grace_s or 0.0)
        except Exception:
            log.exception("%s could not be stopped as it should", slot.name)
        finally:
            del engine
            self._loader.reclaim()
            self._slots.give_back(slot)
            self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()
