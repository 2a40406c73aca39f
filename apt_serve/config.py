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
    websocket_window_bytes: int = 1024 * 1024
    """Bytes sent on a socket beyond those its client has acknowledged; then the server waits for a pong."""
    websocket_patience_s: float = 30.0
    """A socket whose client reads nothing for this long while the server has something to send is closed."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be above 0, got {getattr(self, name)}", field=f"api.{name}")


_POSITIVE = (
    "request_timeout_s",
    "shutdown_grace_s",
    "max_body_bytes",
    "max_generations_per_websocket",
    "websocket_window_bytes",
    "websocket_patience_s",
)


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
