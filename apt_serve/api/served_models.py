"""The models of one replica: the default one, and those that are loaded when they are asked for."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from apt_core.errors import AptError
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.model_fleet import ModelReport, ModelState, ReplicaModels
from apt_serve.config import ServerConfig
from apt_serve.engine.client import EngineClient, EngineStoppedError
from apt_serve.models.engine_loader import EngineLoader, free_memory
from apt_serve.models.errors import GIB, ModelInUseError
from apt_serve.models.model_cache import ModelCache
from apt_serve.models.ports import ModelLoader
from apt_serve.models.slots import Lease, Phase

log = logging.getLogger(__name__)

_STATES: dict[Phase, ModelState] = {Phase.LOADING: "loading", Phase.READY: "loaded", Phase.STOPPING: "stopping"}


class ServedModels:
    """Knows which models there are, and keeps the further ones. The ModelFleet of a server that has no other replica.

    Args:
        default: serves requests that name no model or its own; others start and stop it.
        loader: of the further models; None: the engines that the settings describe.
    """

    def __init__(
        self,
        config: ServerConfig,
        default: EngineClient,
        metrics: PrometheusMetrics,
        loader: ModelLoader | None = None,
    ) -> None:
        self._config = config.models
        self._default_name = config.model.served_name
        self._default = default
        self._engine_configs = {name: config.models.engine_config(name, config.model) for name in config.models.others}
        self._loader = loader or EngineLoader(self._engine_configs, metrics.sink)
        self._metrics = metrics
        self._cache: ModelCache | None = None
        self._loads: set[asyncio.Task[None]] = set()

    @property
    def others(self) -> tuple[str, ...]:
        """Names of all models but the default one."""
        return tuple(self._config.others)

    def engine(self, name: str) -> EngineClient | None:
        """The engine of a further model, to be asked about it and no more; None while it is not loaded."""
        slot = self._cache.slot(name) if self._cache is not None else None
        return slot.engine if slot is not None and slot.phase is Phase.READY else None

    def lease_now(self, name: str) -> Lease | None:
        """See ``ModelCache.try_get_model``."""
        return self._require_cache().try_get_model(name)

    async def lease(self, name: str) -> Lease:
        """See ``ModelCache.get_model``."""
        return await self._require_cache().get_model(name)

    async def start(self) -> None:
        """Find out how much memory there is, once the default model has been loaded; load what is to be preloaded.

        Raises:
            ModelLoadError: a model that is to be preloaded cannot be.
            ConfigError: models of different devices.
        """
        if not self.others:
            return
        gib = self._config.memory_gib
        max_bytes = free_memory(self._engine_configs) if gib is None else int(gib * GIB)
        self._cache = ModelCache(
            self._loader,
            max_models=self._config.max_loaded - 1,
            max_bytes=max_bytes,
            wait_s=self._config.wait_s,
            max_waiting=self._config.max_waiting,
            events=self._metrics.watch_models(self.others),
        )
        most = self._config.max_loaded - 1
        log.info("%d further models, %d at a time, in %.1f GiB", len(self.others), most, max_bytes / GIB)
        await self._cache.preload_models(self._config.preload)

    async def stop(self, grace_s: float) -> None:
        """Give no model away any more; stop all that are loaded, each within the grace period."""
        for task in self._loads:
            task.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)
        if self._cache is not None:
            await self._cache.stop(grace_s)

    # The replica's part of a ModelFleet.

    async def models(self) -> list[ReplicaModels]:
        """See ModelFleet: of this replica alone."""
        return [self.report()]

    async def load_model(self, name: str) -> list[ReplicaModels]:
        """See ModelFleet: of this replica alone."""
        return [await self.begin_load_here(name)]

    async def unload_model(self, name: str) -> list[ReplicaModels]:
        """See ModelFleet: of this replica alone."""
        return [await self.unload_here(name)]

    async def begin_load_here(self, name: str) -> ReplicaModels:
        """Begin to load a further model, if it is not loaded."""
        task = asyncio.create_task(self._load(name))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
        await asyncio.sleep(0)  # it begins
        return self.report()

    async def unload_here(self, name: str) -> ReplicaModels:
        """Unload a further model, unless it is in use."""
        try:
            await self._require_cache().unload(name)
        except ModelInUseError as error:
            return ReplicaModels(self.report().models, str(error))
        return self.report()

    def report(self) -> ReplicaModels:
        """What this replica says of its models."""
        return ReplicaModels((self._default_report(), *map(self._report, self.others)))

    def _default_report(self) -> ModelReport:
        stats = self._default.stats()
        num_requests = stats.num_running + stats.num_waiting
        return ModelReport(self._default_name, "loaded", True, num_requests, 0, None, None)

    def _report(self, name: str) -> ModelReport:
        cache = self._require_cache()
        slot, num_waiting, error = cache.slot(name), cache.num_waiting(name), cache.error(name)
        if slot is None:
            # One that waits for its turn is about to be.
            return ModelReport(name, "loading" if num_waiting else "not_loaded", False, 0, num_waiting, None, error)
        state = _STATES[slot.phase]
        return ModelReport(name, state, False, slot.num_leases, num_waiting, slot.num_bytes, error)

    async def _load(self, name: str) -> None:
        with suppress(AptError):  # the report and the log say why
            await self._require_cache().load(name)

    def _require_cache(self) -> ModelCache:
        if self._cache is None:
            raise EngineStoppedError("The server has not started.")
        return self._cache
