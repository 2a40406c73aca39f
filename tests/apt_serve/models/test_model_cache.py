"""What is loaded when, what makes room, and who waits, over models whose loads take virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from apt_core.errors import ConfigError
from apt_serve.engine.client import EngineClient, EngineStoppedError
from apt_serve.models.errors import ModelBusyError, ModelInUseError, ModelLoadError, ModelTooLargeError
from apt_serve.models.model_cache import ModelCache
from apt_serve.models.slots import Lease, Phase
from tests.apt_serve.models.scripted_loader import ScriptedLoader, kill
from tests.apt_serve.models.virtual_time import VirtualTimeLoop

GIB = 2**30


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.on_load: Callable[[], object] = lambda: None

    def model_loaded(self, name: str, engine: EngineClient, seconds: float) -> None:
        self.seen.append(("loaded", name))
        self.on_load()

    def model_load_failed(self, name: str) -> None:
        self.seen.append(("failed", name))

    def model_unloaded(self, name: str, *, is_evicted: bool) -> None:
        self.seen.append(("evicted" if is_evicted else "unloaded", name))


class World:
    """A cache, what loads its models, and a loop on which tests let time pass."""

    def __init__(self, loop: VirtualTimeLoop, **settings: Any) -> None:
        self.loop = loop
        needs = {"a": GIB, "b": GIB, "c": GIB, "d": GIB, "huge": 9 * GIB, "large": 3 * GIB}
        self.loader = ScriptedLoader(needs)
        self.events = Events()
        self.cache = ModelCache(
            self.loader, **({"max_models": 2, "max_bytes": 4 * GIB, "wait_s": 30.0, "events": self.events} | settings)
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def with_limit() -> Any:
            async with asyncio.timeout(10_000):
                return await work

        return self.loop.run_until_complete(with_limit())

    def lease(self, name: str) -> Lease:
        lease = self.run(self.cache.get_model(name))
        assert isinstance(lease, Lease)
        return lease

    def use(self, *names: str) -> None:
        """One short request after another."""
        for name in names:
            self.lease(name).release()

    def begin(self, name: str) -> asyncio.Task[Lease]:
        """A caller that is left waiting."""
        task = self.loop.create_task(self.cache.get_model(name))
        self.loop.pass_time(0.0)
        return task

    def loaded(self) -> list[str]:
        return [slot.name for slot in self.cache.slots() if slot.phase is Phase.READY]


@pytest.fixture
def loop() -> Iterator[VirtualTimeLoop]:
    loop = VirtualTimeLoop()
    yield loop
    loop.shut_down()


@pytest.fixture
def world(loop: VirtualTimeLoop) -> World:
    return World(loop)


def test_a_model_is_loaded_at_the_first_request_and_kept(world: World) -> None:
    world.use("a", "a", "a")
    assert world.loader.loads == ["a"]
    assert world.events.seen == [("loaded", "a")]


def test_a_lease_gives_the_engine_of_the_model_that_was_asked_for(world: World) -> None:
    async def names() -> list[str]:
        async with await world.cache.get_model("a") as a, await world.cache.get_model("b") as b:
            return [a.model.name, b.model.name]

    assert world.run(names()) == ["a", "b"]
    assert [slot.num_leases for slot in world.cache.slots()] == [0, 0]


def test_the_least_recently_used_model_makes_room(world: World) -> None:
    world.use("a", "b", "a", "c")
    assert world.loaded() == ["a", "c"]
    assert ("evicted", "b") in world.events.seen
    assert world.loader.stops == [("b", 0.0)]


def test_use_is_counted_from_its_end_too(world: World) -> None:
    first = world.lease("a")
    world.use("b")
    first.release()
    world.use("c")
    assert world.loaded() == ["a", "c"]


def test_many_callers_share_one_load(world: World) -> None:
    tasks = [world.begin("a") for _ in range(20)]
    leases = world.run(_all(tasks))
    assert world.loader.loads == ["a"]
    assert len({id(lease.engine) for lease in leases}) == 1
    [slot] = world.cache.slots()
    assert slot.num_leases == 20


def test_models_load_beside_each_other(world: World) -> None:
    world.run(_all([world.begin("a"), world.begin("b")]))
    assert world.loop.time() < 2 * world.loader.load_s


def test_a_caller_that_leaves_does_not_end_the_load_of_others(world: World) -> None:
    first, second = world.begin("a"), world.begin("a")
    world.loop.pass_time(0.5)
    first.cancel()
    assert world.run(second).engine.model.name == "a"
    assert world.loader.loads == ["a"]


def test_a_load_that_has_begun_goes_on_without_callers(world: World) -> None:
    task = world.begin("a")
    world.loop.pass_time(0.5)
    task.cancel()
    world.loop.pass_time(1.0)
    assert world.loaded() == ["a"]
    assert world.cache.slots()[0].num_leases == 0


def test_a_caller_that_leaves_in_the_moment_of_success_leaves_no_lease(world: World) -> None:
    task = world.begin("a")
    world.events.on_load = lambda: world.loop.call_soon(task.cancel)  # runs between the lease and its caller
    world.loop.pass_time(2.0)
    assert task.cancelled()
    assert [(slot.name, slot.num_leases) for slot in world.cache.slots()] == [("a", 0)]


def test_who_waits_for_room_and_leaves_takes_nothing(world: World) -> None:
    held = [world.lease("a"), world.lease("b")]
    task = world.begin("c")
    world.loop.pass_time(1.0)
    task.cancel()
    for lease in held:
        lease.release()
    world.loop.pass_time(10.0)
    assert world.loader.loads == ["a", "b"]
    assert world.loaded() == ["a", "b"]


def test_who_asks_just_when_the_last_caller_leaves_is_served(world: World) -> None:
    held = [world.lease("a"), world.lease("b")]
    first = world.begin("c")
    first.cancel()
    second = world.begin("c")
    held[0].release()
    assert world.run(second).engine.model.name == "c"
    held[1].release()


def test_a_failed_load_is_the_same_error_for_all_and_is_tried_again(world: World) -> None:
    world.loader.failures["a"] = [ConfigError("does not fit", field="max_model_len")]
    tasks = [world.begin("a") for _ in range(3)]
    world.loop.pass_time(2.0)
    errors = [task.exception() for task in tasks]
    assert all(isinstance(error, ModelLoadError) for error in errors)
    assert {str(error) for error in errors} == {"The model 'a' could not be loaded: max_model_len: does not fit"}
    assert world.cache.slots() == []
    assert world.cache.error("a") == "max_model_len: does not fit"
    world.use("a")
    assert world.cache.error("a") is None
    assert world.loader.loads == ["a", "a"]
    assert world.events.seen == [("failed", "a"), ("loaded", "a")]


def test_a_fault_in_a_load_tells_its_kind_alone(world: World) -> None:
    world.loader.failures["a"] = [RuntimeError("secret")]
    with pytest.raises(ModelLoadError) as caught:
        world.use("a")
    assert caught.value.reason == "RuntimeError"


def test_a_model_larger_than_all_memory_says_what_to_lower(world: World) -> None:
    world.use("a")
    with pytest.raises(ModelTooLargeError, match=r"9\.00 GiB .*memory_gib leaves 4\.00: lower its max_num_seqs"):
        world.use("huge")
    assert world.loaded() == ["a"]


def test_memory_makes_room_as_places_do(loop: VirtualTimeLoop) -> None:
    world = World(loop, max_models=4)
    world.use("a", "b", "large")
    assert world.loaded() == ["b", "large"]
    assert world.loader.most_bytes <= 4 * GIB


def test_only_what_has_to_go_goes(loop: VirtualTimeLoop) -> None:
    world = World(loop, max_models=4)
    world.use("a", "large")  # all memory; the older of the two is not large enough for what comes
    world.loader.needs["b"] = 2 * GIB
    world.use("b")
    assert world.loaded() == ["a", "b"]


def test_a_model_in_use_is_not_stopped_and_the_next_one_waits(world: World) -> None:
    held = [world.lease("a"), world.lease("b")]
    task = world.begin("c")
    world.loop.pass_time(5.0)
    assert not task.done() and world.loader.stops == []
    held[1].release()
    assert world.run(task).engine.model.name == "c"
    assert world.loaded() == ["a", "c"]


def test_a_second_release_does_nothing(world: World) -> None:
    first, second = world.lease("a"), world.lease("a")
    first.release()
    first.release()
    assert world.cache.slots()[0].num_leases == 1
    second.release()


def test_who_waits_too_long_is_told_when_to_come_again(world: World) -> None:
    held = [world.lease("a"), world.lease("b")]
    task = world.begin("c")
    world.loop.pass_time(31.0)
    error = task.exception()
    assert isinstance(error, ModelBusyError)
    assert "not ready within 30 s: other models are in use" in str(error)
    assert error.retry_after_s > 0
    for lease in held:
        lease.release()


def test_a_load_that_takes_longer_than_the_wait_is_there_at_the_next_try(world: World) -> None:
    world.loader.load_s = 40.0
    task = world.begin("a")
    world.loop.pass_time(31.0)
    assert "is being loaded" in str(task.exception())
    world.use("a")
    assert world.loader.loads == ["a"]


def test_no_more_wait_than_may(loop: VirtualTimeLoop) -> None:
    world = World(loop, max_waiting=3)
    tasks = [world.begin("a") for _ in range(4)]
    world.loop.pass_time(2.0)
    assert [isinstance(task.exception(), ModelBusyError) for task in tasks] == [False, False, False, True]


def test_nobody_waits_for_ever_behind_requests_for_what_is_loaded(world: World) -> None:
    """Of a and b there is always a request that runs; still c gets its turn."""

    async def overlapping_requests(name: str) -> None:
        while True:
            async with await world.cache.get_model(name):
                await asyncio.sleep(2.0)

    for name in "ab":
        for delay in (0.0, 1.0):
            world.loop.call_later(delay, lambda name=name: world.loop.create_task(overlapping_requests(name)))
    world.loop.pass_time(5.0)
    began = world.loop.time()
    world.use("c")
    assert 15.0 <= world.loop.time() - began <= 15.0 + 2.0 + world.loader.stop_s + world.loader.load_s + 0.1


def test_models_closed_for_a_caller_that_leaves_serve_on(world: World) -> None:
    held = [world.lease("a"), world.lease("b")]
    task = world.begin("c")
    world.loop.pass_time(20.0)
    late = world.begin("a")  # closed by now: it would get in the way
    assert not late.done()
    task.cancel()
    world.loop.pass_time(0.1)
    assert late.result().engine is held[0].engine
    assert world.loader.loads == ["a", "b"]


def test_room_is_given_in_turn(world: World) -> None:
    world.cache = ModelCache(world.loader, max_models=1, max_bytes=4 * GIB, wait_s=100.0)
    held = world.lease("a")
    order: list[str] = []

    async def caller(name: str) -> None:
        async with await world.cache.get_model(name):
            order.append(name)
            await asyncio.sleep(1.0)

    tasks = []
    for name in "bcd":
        tasks.append(world.loop.create_task(caller(name)))
        world.loop.pass_time(0.1)
    held.release()
    world.run(_all(tasks))
    assert order == ["b", "c", "d"]


def test_a_dead_engine_is_dropped_and_loaded_anew(world: World) -> None:
    first = world.lease("a")
    kill(first.engine)
    second = world.lease("a")
    assert second.engine is not first.engine and second.engine.stats().is_alive
    first.release()
    assert [(slot.name, slot.num_leases) for slot in world.cache.slots()] == [("a", 1)]
    assert ("unloaded", "a") in world.events.seen


def test_an_idle_model_can_be_unloaded_and_one_in_use_cannot(world: World) -> None:
    lease = world.lease("a")
    with pytest.raises(ModelInUseError):
        world.run(world.cache.unload("a"))
    lease.release()
    world.run(world.cache.unload("a"))
    assert world.cache.slots() == [] and world.loader.live == {}
    world.run(world.cache.unload("a"))  # no more than what is


def test_a_model_that_is_waited_for_cannot_be_unloaded(world: World) -> None:
    task = world.begin("a")
    with pytest.raises(ModelInUseError):
        world.run(world.cache.unload("a"))
    world.run(task)


def test_a_model_asked_for_while_it_stops_comes_back(world: World) -> None:
    world.use("a")
    unloading = world.loop.create_task(world.cache.unload("a"))
    world.loop.pass_time(0.1)
    assert [slot.phase for slot in world.cache.slots()] == [Phase.STOPPING]
    world.use("a")
    world.run(unloading)
    assert world.loaded() == ["a"]
    assert world.loader.faults == []


def test_models_are_loaded_beforehand(world: World) -> None:
    world.run(world.cache.preload_models(["a", "b"]))
    assert world.loaded() == ["a", "b"]
    assert world.loop.time() < 2 * world.loader.load_s


@pytest.mark.parametrize("names", [["large", "a", "b"], ["large", "large2"]])
def test_what_does_not_fit_together_is_not_loaded_beforehand(world: World, names: list[str]) -> None:
    world.loader.needs["large2"] = 3 * GIB
    with pytest.raises(ModelTooLargeError, match="together they need"):
        world.run(world.cache.preload_models(names))
    assert world.loader.loads == []


def test_loading_by_hand_waits_as_long_as_it_takes_and_keeps_no_lease(world: World) -> None:
    world.loader.load_s = 1000.0
    world.run(world.cache.load("a"))
    assert world.loaded() == ["a"] and world.cache.slots()[0].num_leases == 0


def test_all_models_stop_side_by_side_within_the_grace_period(world: World) -> None:
    world.lease("a")
    world.use("b")
    began = world.loop.time()
    world.run(world.cache.stop(7.0))
    assert world.loop.time() - began < 2 * world.loader.stop_s
    assert sorted(world.loader.stops) == [("a", 7.0), ("b", 7.0)]
    assert world.cache.slots() == []
    world.run(world.cache.stop(7.0))
    with pytest.raises(EngineStoppedError):
        world.use("a")


def test_who_waits_when_the_server_stops_is_told_so(world: World) -> None:
    held = [world.lease("a"), world.lease("b")]
    waiting = world.begin("c")
    world.run(world.cache.stop(1.0))
    assert isinstance(waiting.exception(), EngineStoppedError)
    assert "c" not in world.loader.loads
    for lease in held:
        lease.release()


def test_a_model_that_is_being_loaded_when_the_server_stops_is_stopped_too(world: World) -> None:
    waiting = world.begin("a")
    world.loop.pass_time(0.5)
    world.run(world.cache.stop(5.0))
    assert isinstance(waiting.exception(), EngineStoppedError)
    assert world.loader.live == {}


def test_a_load_that_never_ends_does_not_keep_the_server(world: World) -> None:
    world.loader.load_s = 10_000.0
    world.begin("a")
    world.loop.pass_time(0.5)
    began = world.loop.time()
    world.run(world.cache.stop(5.0))
    assert world.loop.time() - began == pytest.approx(5.0)


async def _all(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    return await asyncio.gather(*tasks)
