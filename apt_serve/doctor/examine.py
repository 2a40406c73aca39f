"""All checks, in the order in which a start would come upon what they look for."""

from __future__ import annotations

from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions
from apt_serve.doctor import engine, environment, stores
from apt_serve.doctor.finding import Finding


def examine(config: ServerConfig, http: HttpOptions, grpc: GrpcOptions = NO_GRPC) -> list[Finding]:
    """What a server with these settings would find on this machine."""
    return [
        environment.packages(),
        environment.open_files(config),
        environment.huge_pages(),
        environment.cache(),
        environment.port(http, grpc),
        engine.device(config.model),
        *engine.model(config.model),
        *(found for other in config.models.others.values() for found in engine.model(other)),
        stores.records(config.records),
        *stores.redis_servers(config),
    ]
