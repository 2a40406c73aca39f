"""The server in one process without Ray: quick to start, and the baseline that Ray Serve is measured against."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from types import FrameType

import uvicorn

from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions
from apt_serve.rpc.listen import listening
from apt_serve.server import Server, log_to_stderr

LINGER_S = 5
"""Connections that are still open when no request runs any more, such as idle sockets, may close for this long."""


def run(config: ServerConfig, http: HttpOptions, on_ready: Callable[[], None], grpc: GrpcOptions = NO_GRPC) -> None:
    """Serve until SIGINT or SIGTERM; running requests may then finish within the grace period.

    Raises:
        AptError: the model cannot be loaded with these settings.
        ConfigError: gRPC cannot listen where it is to.
    """
    log_to_stderr()
    server = Server(config)
    options = uvicorn.Config(
        server.app,
        host=http.host,
        port=http.port,
        lifespan="off",
        ws="websockets-sansio",
        access_log=False,
        proxy_headers=False,  # whose are believed is a setting of ours: limits.trusted_proxies
        log_level="warning",
        timeout_graceful_shutdown=LINGER_S,
    )
    with asyncio.Runner(loop_factory=options.get_loop_factory()) as runner:
        grpc_server = listening(server.rpc, config, http.host, grpc.port) if grpc.is_on else nullcontext()
        runner.run(_serve(server, options, grpc_server, on_ready))


async def _serve(
    server: Server,
    options: uvicorn.Config,
    grpc_server: AbstractAsyncContextManager[int | None],
    on_ready: Callable[[], None],
) -> None:
    await server.start()
    try:
        async with grpc_server:  # as long as uvicorn: new calls are refused in words while running ones finish
            await _DrainingUvicorn(server, options, on_ready).serve()
    finally:
        await server.stop()


class _DrainingUvicorn(uvicorn.Server):
    """uvicorn that goes on listening while running requests finish: new ones get a 503 that says why."""

    def __init__(self, server: Server, options: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(options)
        self._server = server
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._has_signal = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, leave at the second."""
        if self._has_signal:
            os._exit(128 + sig)
        else:
            self._has_signal = True
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._server.stop()
        self.should_exit = True
