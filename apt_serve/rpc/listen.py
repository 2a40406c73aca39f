"""A gRPC server in this process, beside uvicorn's: what Ray Serve's proxy does for replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from apt_core.errors import ConfigError
from apt_serve.config import ServerConfig
from apt_serve.rpc.inference import SERVICE
from apt_serve.rpc.register import add_services
from apt_serve.rpc.services import Services

CONNECTION_HEADROOM: Final = 1024
"""Calls beyond what the engine can hold: health, reflection, and calls that are to be refused with a reason."""
LINGER_S: Final = 5.0
"""When no request runs any more, calls that are still open, such as watches, may end for this long."""
MAX_METADATA_BYTES: Final = 16 * 1024
PING_S: Final = 30
"""A connection on which nothing happens is asked whether it is still there."""
PONG_S: Final = 10
"""One that does not answer within this time is gone, and with it its calls."""


@asynccontextmanager
async def listening(services: Services, config: ServerConfig, host: str, port: int) -> AsyncIterator[int]:
    """Listen while the block runs, then let open calls end.

    Args:
        services: what is served.
        config: of the server.
        host: address to listen on.
        port: 0 takes a free one.

    Yields:
        The port.

    Raises:
        ConfigError: it cannot listen there.
    """
    server = grpc.aio.server(
        options=_options(config),
        maximum_concurrent_rpcs=config.model.max_num_seqs + config.model.max_waiting_requests + CONNECTION_HEADROOM,
    )
    add_services(services, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {address}: {error}", field="grpc_port") from None
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(LINGER_S)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.api.max_body_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.so_reuseport", 0),  # or a second server would share the port and take some of the calls
        ("grpc.keepalive_time_ms", PING_S * 1000),
        ("grpc.keepalive_timeout_ms", PONG_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PONG_S * 1000),
    ]
