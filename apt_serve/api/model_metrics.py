"""Loads and evictions of further models as metrics; the CacheEvents of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from apt_serve.api.engine_metrics import LONG_BUCKETS, EngineGauges
from apt_serve.engine.client import EngineClient


class ModelMetrics:
    """Counts what a ModelCache does, and lets the gauges of engines come and go with them."""

    def __init__(self, registry: CollectorRegistry, gauges: EngineGauges) -> None:
        labels = ["model_name"]
        self._gauges = gauges
        self._loads = Counter("apt:model_loads", "Loads, by how they ended.", [*labels, "outcome"], registry=registry)
        self._seconds = Histogram(
            "apt:model_load_seconds", "Duration of a load.", labels, buckets=LONG_BUCKETS, registry=registry
        )
        self._evictions = Counter("apt:model_evictions", "Models that made room.", labels, registry=registry)
        self._is_loaded = Gauge("apt:model_loaded", "1 while a model is loaded.", labels, registry=registry)

    def know(self, name: str) -> None:
        """Show a model before it is loaded for the first time."""
        self._is_loaded.labels(name).set(0)
        self._evictions.labels(name)

    def model_loaded(self, name: str, engine: EngineClient, seconds: float) -> None:
        """See CacheEvents."""
        self._loads.labels(name, "done").inc()
        self._seconds.labels(name).observe(seconds)
        self._is_loaded.labels(name).set(1)
        self._gauges.watch(name, engine)

    def model_load_failed(self, name: str) -> None:
        """See CacheEvents."""
        self._loads.labels(name, "failed").inc()

    def model_unloaded(self, name: str, *, is_evicted: bool) -> None:
        """See CacheEvents."""
        if is_evicted:
            self._evictions.labels(name).inc()
        self._is_loaded.labels(name).set(0)
        self._gauges.forget(name)
