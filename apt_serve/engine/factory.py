"""The engine that a configuration names."""

from __future__ import annotations

from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.client import EngineClient
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.metrics import MetricsSink
from apt_serve.engine.vllm import VllmEngine


def make_engine(config: EngineConfig, metrics: MetricsSink | None = None) -> EngineClient:
    """An engine that has not started.

    Raises:
        ConfigError: it is not installed.
    """
    if config.engine == "vllm":
        return VllmEngine(config, metrics)
    return AsyncEngine(config, metrics)
