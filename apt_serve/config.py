"""Settings of the server: what deploy/config.yaml may say under ``args``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from apt_core.errors import ConfigError
from apt_serve.engine.config import EngineConfig


@dataclass(frozen=True)
class ApiConfig:
    """The HTTP and WebSocket front."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    request_timeout_s: float = 600.0
    """A request that has not finished by then ends with an error."""
    shutdown_grace_s: float = 30.0
    """On SIGTERM running requests may finish for this long."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Larger request bodies are refused with 413."""
    cors_allow_origins: tuple[str, ...] = ()
    """Origins browsers may call from; "*" for any, empty for none but the same."""
    max_generations_per_websocket: int = 32
    """Generations running at a time on one socket."""

    def __post_init__(self) -> None:
        for name in ("request_timeout_s", "shutdown_grace_s", "max_body_bytes", "max_generations_per_websocket"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be above 0, got {getattr(self, name)}", field=f"api.{name}")


@dataclass(frozen=True)
class ServerConfig:
    """Everything under ``args`` in deploy/config.yaml."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    model: EngineConfig = field(default_factory=EngineConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    replicas: int = 1
    """Copies of the server behind Ray Serve, each with its own engine and weights."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"must be at least 1, got {self.replicas}", field="replicas")
