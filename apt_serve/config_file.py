"""deploy/config.yaml: the file that both `serve run` and `apt-serve start` read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from apt_core.config import load_yaml, parse
from apt_core.errors import ConfigError


@dataclass(frozen=True)
class HttpOptions:
    """Where the server listens."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"must be between 1 and 65535, got {self.port}", field="port")

    @property
    def url(self) -> str:
        """How a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class GrpcOptions:
    """Where the server listens for gRPC, if it does; see docs/grpc.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    port: int = 9000
    """Port to listen on: at the address of http_options without Ray; Ray Serve listens on all addresses."""
    grpc_servicer_functions: tuple[Literal["apt_serve.rpc.register.add_services"], ...] = ()
    """What is served; none: gRPC is off."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"must be between 1 and 65535, got {self.port}", field="port")

    @property
    def is_on(self) -> bool:
        """Whether there is gRPC."""
        return bool(self.grpc_servicer_functions)

    def at(self, port: int) -> GrpcOptions:
        """On, at a port."""
        return GrpcOptions(port, ("apt_serve.rpc.register.add_services",))


NO_GRPC = GrpcOptions()
"""gRPC is off."""


@dataclass(frozen=True)
class Application:
    """One entry of Ray Serve's list of applications."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    import_path: Literal["apt_serve.deployment:build"] = "apt_serve.deployment:build"
    name: str = "apt"
    route_prefix: Literal["/"] = "/"
    args: dict[str, Any] = field(default_factory=dict)
    """Settings of the server, see apt_serve.config.ServerConfig; checked by whoever reads them."""


@dataclass(frozen=True)
class ConfigFile:
    """The part of Ray Serve's schema that APT uses. More of it, such as autoscaling, needs `serve run`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    applications: tuple[Application, ...]
    proxy_location: Literal["EveryNode", "HeadOnly"] = "HeadOnly"
    http_options: HttpOptions = field(default_factory=HttpOptions)
    grpc_options: GrpcOptions = field(default=NO_GRPC)

    def __post_init__(self) -> None:
        if len(self.applications) != 1:
            raise ConfigError(f"must hold exactly one, got {len(self.applications)}", field="applications")

    @property
    def args(self) -> dict[str, Any]:
        """Settings of the server."""
        return self.applications[0].args


def read_config_file(path: Path | str) -> ConfigFile:
    """Read a configuration of `serve run`.

    Raises:
        ConfigError: the file cannot be read, or says what APT does not understand.
    """
    return parse(ConfigFile, load_yaml(path))


def default_config_file() -> ConfigFile:
    """What holds without a file."""
    return ConfigFile(applications=(Application(),))
