"""The service grpc.health.v1.Health: whether requests are taken, and the engine makes progress."""

from __future__ import annotations

import asyncio
from typing import Final

from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse

from apt_serve.api.state import ApiState, Phase
from apt_serve.rpc.call import Context, WritingContext
from apt_serve.rpc.inference import SERVICE

WATCH_S: Final = 0.5
"""How often a watched state is looked at."""
_SERVICES: Final = ("", SERVICE)
"""Names to ask for; empty: the server."""


class HealthService:
    """Open to everybody, as /health and /ready are."""

    def __init__(self, state: ApiState) -> None:
        self._state = state

    async def Check(self, request: HealthCheckRequest, context: Context) -> HealthCheckResponse:
        """The state now; NOT_FOUND for a service that is none."""
        if getattr(request, "service", None) not in _SERVICES:  # it may be an Undecodable
            context.set_code(StatusCode.NOT_FOUND)
            context.set_details("unknown service")
            return HealthCheckResponse()
        return HealthCheckResponse(status=self._status())

    async def List(self, request: HealthListRequest, context: Context) -> HealthListResponse:
        """The state of all services now."""
        return HealthListResponse(statuses={name: HealthCheckResponse(status=self._status()) for name in _SERVICES})

    async def Watch(self, request: HealthCheckRequest, context: WritingContext) -> None:
        """The state now and each time it changes, until the server stops."""
        is_known = getattr(request, "service", None) in _SERVICES
        told: int | None = None
        while True:
            is_last = self._state.phase is Phase.STOPPING
            status = self._status() if is_known else HealthCheckResponse.SERVICE_UNKNOWN
            if status != told:
                await context.write(HealthCheckResponse(status=status))
                told = status
            if is_last:
                return
            await asyncio.sleep(WATCH_S)

    def _status(self) -> int:
        serving: int = HealthCheckResponse.SERVING
        not_serving: int = HealthCheckResponse.NOT_SERVING
        if self._state.phase is not Phase.READY:
            return not_serving
        stats = self._state.engine.stats()
        return serving if stats.is_alive and not stats.is_stalled else not_serving
