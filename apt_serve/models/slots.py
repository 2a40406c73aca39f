"""The models that take up room in a ModelCache, and which of them would have to go for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from apt_serve.engine.client import EngineClient


class Phase(StrEnum):
    """Where a model is in its life; it takes up room in all of it."""

    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(eq=False)
class Slot:
    """One model's place."""

    name: str
    num_bytes: int
    """Reserved for it."""
    phase: Phase = Phase.LOADING
    engine: EngineClient | None = None
    """None while it loads."""
    num_leases: int = 0
    last_use: int = 0
    """Number of the last time a lease was given or came back: the higher, the later."""
    closed_for: object | None = None
    """Who waits for it to become idle; it gives no new leases meanwhile."""

    @property
    def is_idle(self) -> bool:
        """Whether it may be stopped."""
        return self.phase is Phase.READY and not self.num_leases


class Lease:
    """A loaded model that is not stopped until this is released; as an async context manager it gives the engine."""

    def __init__(self, slots: Slots, slot: Slot) -> None:
        self._engine = slot.engine
        self._slots = slots
        self._slot: Slot | None = slot
        slot.num_leases += 1
        slots.touch(slot)

    @property
    def engine(self) -> EngineClient:
        """Of the model; not to be asked for after ``release``."""
        assert self._engine is not None
        return self._engine

    def release(self) -> None:
        """Let the model go, without so much as a reference to it; a second time does nothing."""
        if self._slot is not None:
            slot, self._slot, self._engine = self._slot, None, None
            slot.num_leases -= 1
            self._slots.touch(slot)
            self._slots.on_release()

    async def __aenter__(self) -> EngineClient:
        return self.engine

    async def __aexit__(self, *_: object) -> None:
        self.release()


@dataclass
class Slots:
    """All that take up room: never more than ``max_models``, nor more bytes than ``max_bytes``."""

    max_models: int
    max_bytes: int
    on_release: Callable[[], None]
    """Called when a lease has come back."""
    _by_name: dict[str, Slot] = field(default_factory=dict)
    _num_uses: int = 0

    def get(self, name: str) -> Slot | None:
        """A model's slot, if it has one."""
        return self._by_name.get(name)

    def all(self) -> list[Slot]:
        """Every slot, the least recently used first."""
        return sorted(self._by_name.values(), key=lambda slot: slot.last_use)

    def take(self, name: str, num_bytes: int) -> Slot:
        """Reserve room for a model that is about to be loaded; there must be enough."""
        assert name not in self._by_name and self.has_room(num_bytes, without=[])
        slot = self._by_name[name] = Slot(name, num_bytes)
        self.touch(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """The end of ``take``, once nothing of the model is left."""
        assert self._by_name[slot.name] is slot
        del self._by_name[slot.name]

    def touch(self, slot: Slot) -> None:
        """It is the most recently used one now."""
        self._num_uses += 1
        slot.last_use = self._num_uses

    def has_room(self, num_bytes: int, without: list[Slot]) -> bool:
        """Whether a model of this size fits beside all slots but some."""
        others = [slot for slot in self._by_name.values() if slot not in without]
        return len(others) < self.max_models and sum(slot.num_bytes for slot in others) + num_bytes <= self.max_bytes

    def victims(self, num_bytes: int, candidates: Sequence[Slot]) -> list[Slot] | None:
        """Which candidates, the first of them if there is a choice, make room for a model once they have gone.

        Returns:
            None if not even all of them do, with all that is on its way out already.
        """
        leaving = [slot for slot in self._by_name.values() if slot.phase is Phase.STOPPING]
        chosen = list(candidates)
        if not self.has_room(num_bytes, [*leaving, *chosen]):
            return None
        for slot in reversed(candidates):
            kept = [each for each in chosen if each is not slot]
            if self.has_room(num_bytes, [*leaving, *kept]):
                chosen = kept
        return chosen
