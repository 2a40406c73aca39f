"""The application together with its engine, whatever runs them: Ray Serve, or uvicorn alone."""

from __future__ import annotations

import logging

from fastapi import FastAPI

from apt_serve.api.app import create_app
from apt_serve.api.current_weights import current_model
from apt_serve.api.handover import Handover
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.model_fleet import ServerFleet
from apt_serve.api.served_models import ServedModels
from apt_serve.api.state import ApiState, Phase
from apt_serve.config import ServerConfig
from apt_serve.engine.factory import make_engine
from apt_serve.rpc.inference import Cancel
from apt_serve.rpc.services import Services


class Server:
    """The default engine, those of further models, the HTTP application and the gRPC services over them.

    Nothing is loaded until ``start``.

    The runner starts and stops it, not the application's ASGI lifespan: so the runner sees why a model cannot be
    loaded, and can drain while it still listens.

    Args:
        fleet: all replicas that new weights and orders to load models go to; None: this one has no others.
        cancel: ends a generation of gRPC's on whatever replica; None: this one has no others.

    Raises:
        ConfigError: the engine is not installed, the admin token in the environment is too short, or a key of access
            control cannot be read.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        is_behind_serve: bool = False,
        fleet: ServerFleet | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        metrics = PrometheusMetrics(config.model.served_name)
        engine = make_engine(current_model(config), metrics)
        self.handover = Handover(config, engine, metrics)
        self.models = ServedModels(config, engine, metrics)
        self.app: FastAPI = create_app(
            config,
            engine,
            metrics,
            runs_engine=False,
            is_behind_serve=is_behind_serve,
            fleet=fleet or self.handover,
            models=self.models,
            model_fleet=fleet or self.models,
        )
        self._state: ApiState = self.app.state.api
        self.rpc = Services(self._state, cancel)

    async def start(self) -> None:
        """Load the model and make ready.

        Raises:
            AptError: the model cannot be loaded with these settings.
        """
        await self._state.start()
        await self.handover.catch_up()

    async def stop(self) -> None:
        """Answer new requests with 503; return when running ones have finished or the grace period is over.

        May be called again.
        """
        await self._state.stop()

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


def log_to_stderr() -> None:
    """Let APT's own loggers, and nobody else's, say what they do."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("apt_core", "apt_kernels", "apt_serve"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]
        logger.propagate = False
