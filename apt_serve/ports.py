"""Whether the server can listen where it is to."""

from __future__ import annotations

import socket

from apt_core.errors import ConfigError
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions


def require_free_port(http: HttpOptions, grpc: GrpcOptions = NO_GRPC) -> None:
    """Refuse at once, before a model is loaded for nothing.

    Raises:
        ConfigError: somebody else listens there, or the address is none of this machine's.
    """
    _require_free(http.host, http.port, "port")
    if grpc.is_on:
        if grpc.port == http.port:
            raise ConfigError(f"must be another than HTTP's, got {grpc.port}", field="grpc_port")
        _require_free(http.host, grpc.port, "grpc_port")


def _require_free(host: str, port: int, field: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", field=field) from None
