"""What every handler needs: settings, engine, metrics, and whether the server is up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from apt_serve.api.errors import model_not_found
from apt_serve.api.formatting import Envelope
from apt_serve.api.generation import Job
from apt_serve.api.handover import Fleet
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.engine.client import EngineClient


class Phase(StrEnum):
    """Where the server is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@dataclass
class ApiState:
    """One per app; the only mutable part is the phase."""

    config: ServerConfig
    engine: EngineClient
    metrics: PrometheusMetrics
    fleet: Fleet
    """For new weights."""
    admin_token: str | None = None
    """Of who may load them; None: nobody may."""
    phase: Phase = Phase.STARTING

    async def start(self) -> None:
        """Load the model and make ready."""
        await self.engine.start()
        self.phase = Phase.READY

    async def stop(self) -> None:
        """Refuse new requests, let running ones finish within the grace period, abort the rest."""
        self.phase = Phase.STOPPING
        await self.engine.stop(self.config.api.shutdown_grace_s)

    def engine_for(self, model: str | None) -> EngineClient:
        """The engine that serves a model.

        Raises:
            ApiError: no such model.
        """
        if model is not None and model != self.engine.model.name:
            raise model_not_found(model)
        return self.engine

    def envelope(self, job: Job) -> Envelope:
        """What all bodies of an answer begin with."""
        return Envelope(job, settings=repr(self.config.model))


def state_of(connection: HTTPConnection) -> ApiState:
    """The state of the app that a connection belongs to."""
    state = connection.app.state.api
    assert isinstance(state, ApiState)
    return state


State = Annotated[ApiState, Depends(state_of)]
