"""What holds of a ModelCache whatever callers do, and however loads and stops fall in time."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apt_core.errors import ConfigError
from apt_serve.engine.client import EngineStoppedError
from apt_serve.models.errors import ModelBusyError, ModelInUseError, ModelLoadError
from apt_serve.models.model_cache import ModelCache
from apt_serve.models.slots import Lease, Phase
from tests.apt_serve.models.scripted_loader import ScriptedLoader, kill
from tests.apt_serve.models.virtual_time import VirtualTimeLoop

NEEDS = {"a": 1, "b": 2, "c": 3, "d": 4, "too large": 99}
WAIT_S = 10.0
names = st.sampled_from(sorted(NEEDS))
seconds = st.sampled_from([0.0, 0.02, 0.3, 1.0, 3.0, 7.0])


class Cache(RuleBasedStateMachine):
    """Callers that come, hold, let go and leave, over engines that take their time and die."""

    @initialize(max_models=st.integers(1, 4), max_bytes=st.integers(4, 9), load_s=seconds, stop_s=seconds)
    def make(self, max_models: int, max_bytes: int, load_s: float, stop_s: float) -> None:
        self.loop = VirtualTimeLoop()
        self.limits = (max_models, max_bytes)
        self.loader = ScriptedLoader(NEEDS, load_s=load_s, stop_s=stop_s)
        self.cache = ModelCache(self.loader, max_models=max_models, max_bytes=max_bytes, wait_s=WAIT_S, max_waiting=6)
        self.callers: list[tuple[str, asyncio.Task[Lease]]] = []
        self.held: list[tuple[str, Lease]] = []
        self.others: list[asyncio.Task[None]] = []
        self.dead: set[int] = set()
        self.is_stopped = False

    @rule(name=names, count=st.integers(1, 3))
    def ask(self, name: str, count: int) -> None:
        self.callers += [(name, self.loop.create_task(self.cache.get_model(name))) for _ in range(count)]
        self.settle(0.0)

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def let_go(self, data: st.DataObject) -> None:
        name, lease = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.loader.in_use[name] -= 1
        lease.release()

    @rule(data=st.data(), delay=seconds)
    @precondition(lambda self: self.callers)
    def leave(self, data: st.DataObject, delay: float) -> None:
        """At once, or at a moment at which other things happen."""
        _, task = data.draw(st.sampled_from(self.callers))
        self.loop.call_later(delay, task.cancel)

    @rule(duration=seconds)
    def wait(self, duration: float) -> None:
        self.settle(duration)

    @rule(name=names)
    def unload(self, name: str) -> None:
        self.others.append(self.loop.create_task(self._unload(name)))

    @rule(name=names)
    def fail_next(self, name: str) -> None:
        self.loader.failures.setdefault(name, []).append(ConfigError("does not fit", field="source"))

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def die(self, data: st.DataObject) -> None:
        _, lease = data.draw(st.sampled_from(self.held))
        kill(lease.engine)
        self.dead.add(id(lease.engine))

    @rule(grace_s=seconds)
    @precondition(lambda self: len(self.loader.loads) > 3)
    def stop(self, grace_s: float) -> None:
        self.is_stopped = True
        self.others.append(self.loop.create_task(self.cache.stop(grace_s + 0.01)))

    @invariant()
    def nothing_is_broken(self) -> None:
        if not hasattr(self, "loader"):
            return
        max_models, max_bytes = self.limits
        assert self.loader.faults == []
        assert self.loader.most_models <= max_models
        assert self.loader.most_bytes <= max_bytes

    @invariant()
    def every_lease_is_known(self) -> None:
        """Leases that the cache counts are those that callers hold, of engines that have not died since."""
        if not hasattr(self, "loader"):
            return
        self.settle(0.0)
        held = Counter(name for name, lease in self.held if id(lease.engine) not in self.dead)
        for slot in self.cache.slots():
            if slot.phase is Phase.READY and slot.engine is not None and id(slot.engine) not in self.dead:
                assert slot.num_leases == held[slot.name], slot

    def settle(self, duration: float) -> None:
        """Let time pass, and take what callers have got."""
        end = self.loop.time() + duration
        while True:
            self.loop.pass_time(min(0.05, max(end - self.loop.time(), 0.0)))
            self._collect()
            if self.loop.time() >= end:
                return

    def teardown(self) -> None:
        """When everybody has let go, everything comes to an end."""
        if not hasattr(self, "loader"):
            return
        for name, lease in self.held:
            self.loader.in_use[name] -= 1
            lease.release()
        self.held.clear()
        for _ in range(40):  # long enough for all turns, each of which may take a load and a stop
            self.settle(2.0)
            while self.held:
                name, lease = self.held.pop()
                self.loader.in_use[name] -= 1
                lease.release()
        self.settle(WAIT_S)
        assert not self.callers
        assert all(slot.num_leases == 0 and slot.closed_for is None for slot in self.cache.slots())
        assert all(task.done() and task.exception() is None for task in self.others)
        self.loop.run_until_complete(self.cache.stop(100.0))
        assert self.cache.slots() == [] and self.loader.live == {}
        self.loop.shut_down()

    def _collect(self) -> None:
        for caller in [caller for caller in self.callers if caller[1].done()]:
            self.callers.remove(caller)
            name, task = caller
            if task.cancelled():
                continue
            error = task.exception()
            if error is None:
                lease = task.result()
                assert lease.engine.model.name == name
                self.held.append((name, lease))
                self.loader.in_use[name] = self.loader.in_use.get(name, 0) + 1
            else:
                assert isinstance(error, ModelBusyError | ModelLoadError | EngineStoppedError), error
                assert self.is_stopped or not isinstance(error, EngineStoppedError)

    async def _unload(self, name: str) -> None:
        try:
            await self.cache.unload(name)
        except ModelInUseError:
            return


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
