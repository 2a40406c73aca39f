"""Settings of the server: what deploy/config.yaml may say under ``args``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from apt_core.errors import ConfigError
from apt_serve.access.config import AccessConfig
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.handover import SwapMode
from apt_serve.jobs.config import JobsConfig
from apt_serve.limits.config import LimitsConfig
from apt_serve.models.config import ModelsConfig
from apt_serve.records.config import RecordsConfig
from apt_serve.telemetry.config import TelemetryConfig

TOKEN_VARIABLE = "APT_ADMIN_TOKEN"
MIN_TOKEN_LENGTH = 16


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
    """A socket or gRPC call whose client reads nothing for this long while there is something to send is closed."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"must be above 0, got {getattr(self, name)}", field=f"api.{name}")


@dataclass(frozen=True)
class AdminConfig:
    """New weights while the server runs; see docs/handover.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    token: str | None = field(default=None, repr=False)
    """Bearer token that may do everything, at least 16 characters; None takes the environment variable APT_ADMIN_TOKEN.
    Without either, and without access control, there is no /admin."""
    weight_folders: tuple[str, ...] = ()
    """Weights are loaded from below these folders only, which trainer and replicas share. What was loaded last is noted
    in the first, and a replica that starts begins with it in place of model.source."""
    swap: SwapMode = "overlap"
    """Requests that run on the old weights finish beside new ones (overlap), finish while new ones wait (drain), or end
    with an error (abort)."""
    swap_timeout_s: float = 300.0
    """Those that have not finished so long after the change end with an error."""

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < MIN_TOKEN_LENGTH:
            raise ConfigError(f"must have at least {MIN_TOKEN_LENGTH} characters", field="admin.token")
        for folder in self.weight_folders:
            if not Path(folder).expanduser().is_absolute():
                raise ConfigError(f"must be absolute paths, got {folder}", field="admin.weight_folders")
        if self.swap_timeout_s <= 0:
            raise ConfigError(f"must be above 0, got {self.swap_timeout_s}", field="admin.swap_timeout_s")

    @property
    def bearer_token(self) -> str | None:
        """The token, from the settings or the environment of this process.

        Raises:
            ConfigError: that in the environment is too short.
        """
        token = self.token or os.environ.get(TOKEN_VARIABLE)
        if token and len(token) < MIN_TOKEN_LENGTH:
            raise ConfigError(f"must have at least {MIN_TOKEN_LENGTH} characters", field=TOKEN_VARIABLE)
        return token or None


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
    models: ModelsConfig = field(default_factory=ModelsConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    replicas: int = 1
    """Copies of the server behind Ray Serve, each with its own engine and weights."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"must be at least 1, got {self.replicas}", field="replicas")
        if self.model.served_name in self.models.others:
            problem = "is the name of the default model"
            raise ConfigError(problem, field=f"models.others.{self.model.served_name}")

    @property
    def job_priority(self) -> int | None:
        """Of the requests of batches and jobs; None where no engine orders by priorities, or one refuses them."""
        policies = {model.policy for model in (self.model, *self.models.others.values())}
        refuses = self.model.engine == "vllm" and self.model.policy != "priority"
        return self.jobs.priority if "priority" in policies and not refuses else None

    @property
    def max_requests(self) -> int:
        """Most requests that run and wait at a time in the engines of one replica, and that wait for a model."""
        others = sorted(map(_num_requests, self.models.others.values()), reverse=True)
        loaded = others[: self.models.max_loaded - 1]
        return _num_requests(self.model) + sum(loaded) + (self.models.max_waiting if others else 0)

    def settings_of(self, name: str | None) -> EngineConfig:
        """Settings of the model of a name; of the default model where it is none of the others."""
        return self.model if name is None else self.models.others.get(name, self.model)


def _num_requests(model: EngineConfig) -> int:
    return model.max_num_seqs + model.max_waiting_requests
