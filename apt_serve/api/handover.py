"""New weights for this replica and, by way of the fleet, for all of them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from apt_core.errors import AptError
from apt_serve.api.current_weights import read_pointer, write_pointer
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.engine.client import Capability, EngineClient
from apt_serve.engine.handover import SwapOrder, SwapReport

log = logging.getLogger(__name__)


class Refusal(StrEnum):
    """An order that a replica does not take, by its code on the wire."""

    RUNNING = "swap_running"
    UNSUPPORTED = "swap_unsupported"


@dataclass(frozen=True, slots=True)
class ReplicaWeights:
    """What one replica says of its weights."""

    weight_version: str
    """That new requests start on."""
    swap: SwapReport | None
    """The latest; None if there was none."""
    refusal: Refusal | None = None
    """Why an order was not taken."""


class Fleet(Protocol):
    """All replicas of the server, this one included."""

    async def begin(self, order: SwapOrder) -> list[ReplicaWeights]:
        """Let every replica begin a swap; what each says of it."""

    async def weights(self) -> list[ReplicaWeights]:
        """What every replica says of its weights."""


class Handover:
    """Runs the swaps of one replica. The Fleet of a server that has no other."""

    def __init__(self, config: ServerConfig, engine: EngineClient, metrics: PrometheusMetrics) -> None:
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None

    async def begin(self, order: SwapOrder) -> list[ReplicaWeights]:
        """See Fleet: of this replica alone."""
        return [await self.begin_here(order)]

    async def weights(self) -> list[ReplicaWeights]:
        """See Fleet: of this replica alone."""
        return [self.weights_here()]

    async def begin_here(self, order: SwapOrder) -> ReplicaWeights:
        """Begin a swap, if none runs and the engine can."""
        here = self.weights_here()
        if Capability.WEIGHT_SWAP not in self._engine.capabilities:
            return replace(here, refusal=Refusal.UNSUPPORTED)
        if self._task is not None and not self._task.done():
            return replace(here, refusal=Refusal.RUNNING)
        self._task = asyncio.create_task(self._swap(order))
        await asyncio.sleep(0)  # it begins
        return self.weights_here()

    def weights_here(self) -> ReplicaWeights:
        """What this replica says; raises EngineStoppedError before it has started."""
        return ReplicaWeights(self._engine.model.weight_version, self._engine.swap)

    async def catch_up(self) -> None:
        """After the start: the weights that were published while this replica was loading."""
        pointer = read_pointer(self._config)
        if pointer is not None and pointer.version != self._engine.model.weight_version:
            admin = self._config.admin
            await self.begin_here(SwapOrder(pointer.path, admin.swap, admin.swap_timeout_s))

    async def _swap(self, order: SwapOrder) -> None:
        try:
            report = await self._engine.swap_weights(order)
        except AptError:  # the report says why
            self._metrics.swapped("failed")
            return
        self._metrics.swapped("done")
        assert report.to_version is not None
        write_pointer(self._config, order.path, report.to_version)
