"""The application together with its engine, whatever runs them: Ray Serve, or uvicorn alone."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.state import ApiState, Phase
from apt_serve.config import ServerConfig
from apt_serve.engine.async_engine import AsyncEngine


class Server:
    """One engine and the HTTP application over it. Nothing is loaded until the application's lifespan begins."""

    def __init__(self, config: ServerConfig) -> None:
        metrics = PrometheusMetrics(config.model.served_name)
        self.app: FastAPI = create_app(config, AsyncEngine(config.model, metrics), metrics)

    def lifespan(self) -> AbstractAsyncContextManager[object]:
        """Load the model on entry and stop the engine on exit, for a runner that does not do so by ASGI.

        Raises, on entry:
            AptError: the model cannot be loaded with these settings.
        """
        return self.app.router.lifespan_context(self.app)

    async def drain(self) -> None:
        """Answer new requests with 503, and return when running ones have finished or the grace period is over."""
        self._state.phase = Phase.STOPPING
        await self._state.engine.stop(self._state.config.api.shutdown_grace_s)

    def problem(self) -> str | None:
        """Why this server should be replaced, if it should: its engine has died or hangs."""
        if self._state.phase is not Phase.READY:
            return None
        stats = self._state.engine.stats()
        if not stats.is_alive:
            return "the engine is dead"
        if stats.is_stalled:
            return f"requests run but no step has completed for {stats.seconds_since_progress:.0f} s"
        return None

    @property
    def _state(self) -> ApiState:
        state = self.app.state.api
        assert isinstance(state, ApiState)
        return state
