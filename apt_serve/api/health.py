"""Health means forward progress; readiness means that requests are taken."""

from __future__ import annotations

from fastapi import APIRouter, Response

from apt_serve.api.errors import ApiError
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.simple import HealthResponse
from apt_serve.api.state import Phase, State

router = APIRouter(tags=["Operations"])


@router.get("/health", response_model=HealthResponse, responses=errors(503))
async def health(state: State) -> Response:
    """200 while the engine makes progress; 503 once it is dead or has hung, and a restart is due."""
    if state.phase is Phase.READY:
        stats = state.engine.stats()
        if not stats.is_alive:
            raise _unhealthy("The engine is dead.", "engine_dead")
        if stats.is_stalled:
            message = f"Requests run but the engine made no progress for {stats.seconds_since_progress:.0f} seconds."
            raise _unhealthy(message, "engine_stalled")
    return HealthResponse(status="ok").response()


@router.get("/ready", response_model=HealthResponse, responses=errors(503))
async def ready(state: State) -> Response:
    """200 once the model serves; 503 while it loads, while the server stops, and when the engine is dead."""
    if state.phase is not Phase.READY or not state.engine.stats().is_alive:
        raise _unhealthy(f"The server is {state.phase.value}, or its engine is dead.", "not_ready")
    return HealthResponse(status="ready").response()


def _unhealthy(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="server_error", code=code)
