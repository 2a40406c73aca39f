"""Settings of further models beside the one that is always loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from apt_core.errors import ConfigError
from apt_serve.engine.config import EngineConfig


@dataclass(frozen=True)
class ModelsConfig:
    """Further models, loaded when a request names them; see docs/models.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    others: dict[str, EngineConfig] = field(default_factory=dict)
    """By the name that requests use, with the settings of the model section, such as {small: {source: /models/small}}.
    The native engine only."""
    max_loaded: int = 3
    """Models loaded at a time, the default one included; the least recently used of the others makes room."""
    memory_gib: float | None = None
    """GiB that weights and KV caches of the others may take together; null: 90 % of what is free once the default model
    is loaded."""
    preload: tuple[str, ...] = ()
    """Of the others, loaded before the server is ready."""
    wait_s: float = 30.0
    """A request waits so long for a model to be loaded, or for others to make room, before it gets a 503."""
    max_waiting: int = 512
    """Requests that may wait for models; beyond it new ones are refused with Retry-After."""

    def __post_init__(self) -> None:
        for name in ("memory_gib", "wait_s", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"must be above 0, got {value}", field=f"models.{name}")
        if self.others and self.max_loaded < 2:
            problem = f"must be at least 2 to load any of models.others beside the default one, got {self.max_loaded}"
            raise ConfigError(problem, field="models.max_loaded")
        unknown = [name for name in self.preload if name not in self.others]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is none of models.others", field="models.preload")
        if len(set(self.preload)) > self.max_loaded - 1:
            problem = f"{len(set(self.preload))} beside the default one are more than max_loaded {self.max_loaded}"
            raise ConfigError(problem, field="models.preload")
        for name, model in self.others.items():
            _check(name, model)

    def engine_config(self, name: str, default: EngineConfig) -> EngineConfig:
        """Settings of a further model's engine. Threads are the process's, so it has as many as the default model."""
        return replace(self.others[name], name=name, num_threads=default.num_threads)


def _check(name: str, model: EngineConfig) -> None:
    where = f"models.others.{name}"
    if not name or len(name) > 256 or not name.isprintable():
        raise ConfigError("a model's name has 1 to 256 printable characters", field=where)
    if model.engine != "native":
        raise ConfigError("vLLM serves the default model only: it takes memory by shares", field=f"{where}.engine")
    if model.name is not None and model.name != name:
        raise ConfigError(f"the model's name is {name!r} already; leave it out", field=f"{where}.name")
    if model.num_threads is not None:
        raise ConfigError("holds for the whole server; set model.num_threads", field=f"{where}.num_threads")
    if model.device == "cuda" and model.kv_cache_gib is None and model.num_kv_blocks is None:
        raise ConfigError("say how large its KV cache is on a GPU", field=f"{where}.kv_cache_gib")
