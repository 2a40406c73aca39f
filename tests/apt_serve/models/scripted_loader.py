"""A ModelLoader whose models take as long, need as much and fail as often as a test says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from apt_core.errors import ConfigError
from apt_serve.engine.client import EngineClient
from apt_serve.engine.metrics import NullMetrics
from tests.apt_serve.api.scripted_engine import ScriptedEngine


@dataclass
class ScriptedLoader:
    needs: dict[str, int]
    """Bytes of each model."""
    load_s: float = 1.0
    stop_s: float = 0.5
    failures: dict[str, list[Exception]] = field(default_factory=dict)
    """What the next loads of a model raise."""
    loads: list[str] = field(default_factory=list)
    stops: list[tuple[str, float]] = field(default_factory=list)
    """Names, with the grace period."""
    live: dict[str, int] = field(default_factory=dict)
    """Bytes of each model that is loaded or being loaded, by a counter of its own."""
    stopped: list[str] = field(default_factory=list)
    """Whose memory is not free yet."""
    most_models: int = 0
    most_bytes: int = 0
    in_use: dict[str, int] = field(default_factory=dict)
    """Leases that a test holds, by name; a model may not be stopped meanwhile."""
    faults: list[str] = field(default_factory=list)

    async def memory_need(self, name: str) -> int:
        await asyncio.sleep(0.01)
        if name not in self.needs:
            raise ConfigError("there is no such model", field=f"models.others.{name}")
        return self.needs[name]

    async def load(self, name: str) -> EngineClient:
        if name in self.live:
            self.faults.append(f"{name} is loaded twice")
        self.loads.append(name)
        self.live[name] = self.needs[name]
        self.most_models = max(self.most_models, len(self.live))
        self.most_bytes = max(self.most_bytes, sum(self.live.values()))
        try:
            await asyncio.sleep(self.load_s)
            if self.failures.get(name):
                raise self.failures[name].pop(0)
        except BaseException:
            del self.live[name]
            raise
        engine: Any = ScriptedEngine(NullMetrics(), name=name)
        return engine  # type: ignore[no-any-return]

    async def stop(self, name: str, engine: EngineClient, grace_s: float) -> None:
        if self.in_use.get(name) and engine.stats().is_alive and not grace_s:
            self.faults.append(f"{name} is stopped while {self.in_use[name]} use it")
        self.stops.append((name, grace_s))
        await asyncio.sleep(self.stop_s)
        self.stopped.append(name)

    def reclaim(self) -> None:
        del self.live[self.stopped.pop(0)]


def kill(engine: EngineClient) -> None:
    """Its engine has died."""
    assert isinstance(engine, ScriptedEngine)
    engine.script = replace(engine.script, is_alive=False)
