"""What every handler needs: settings, engine, metrics, and whether the server is up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from apt_serve.access.authenticator import Authenticator, require_model
from apt_serve.access.identity import Identity
from apt_serve.api.errors import model_not_found
from apt_serve.api.formatting import Envelope
from apt_serve.api.generation import Batches, Job, Origin, run_job
from apt_serve.api.handover import Fleet
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.observe import Observer
from apt_serve.config import ServerConfig
from apt_serve.engine.client import EngineClient
from apt_serve.jobs.service import JobService
from apt_serve.limits.limiter import Limiter
from apt_serve.records.database import Database


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
    jobs: JobService
    """Files, batches and jobs."""
    database: Database
    access: Authenticator
    limiter: Limiter
    """How much callers may take."""
    observer: Observer
    """Told of every request that has ended."""
    phase: Phase = Phase.STARTING

    async def start(self) -> None:
        """Load the model and make ready."""
        self.access.start()
        await self.engine.start()
        self.phase = Phase.READY
        await self.jobs.start()

    async def stop(self) -> None:
        """Refuse new requests, let running ones finish within the grace period, abort the rest."""
        self.phase = Phase.STOPPING
        await self.jobs.stop()
        await self.engine.stop(self.config.api.shutdown_grace_s)
        await self.access.stop()
        await self.limiter.close()
        await self.database.close()
        await self.observer.close()

    def engine_for(self, caller: Identity, model: str | None) -> EngineClient:
        """The engine that serves a model.

        Raises:
            PermissionDeniedError: the caller may not use it, whether or not it is there.
            ApiError: no such model.
        """
        require_model(caller, model if model is not None else self.engine.model.name)
        if model is not None and model != self.engine.model.name:
            raise model_not_found(model)
        return self.engine

    def origin(self, caller: Identity, cache_salt: str | None = None) -> Origin:
        """What the engine is told of a caller.

        Args:
            cache_salt: the client's own: it shares prefixes with requests that give the same one alone.
        """
        if self.config.model.share_prefixes == "tenant":
            return Origin(caller.owner, json.dumps([caller.owner, cache_salt]))
        return Origin(caller.owner, cache_salt or "")

    def run(self, engine: EngineClient, job: Job, caller: Identity) -> Batches:
        """Run a job as long as its caller may; see ``run_job``.

        Raises:
            AuthenticationError: the caller's key was revoked meanwhile.
        """
        return run_job(engine, job, self.config.api.request_timeout_s, lambda: self.access.while_valid(caller))

    def envelope(self, job: Job) -> Envelope:
        """What all bodies of an answer begin with."""
        return Envelope(job, settings=repr(self.config.model))


def state_of(connection: HTTPConnection) -> ApiState:
    """The state of the app that a connection belongs to."""
    state = connection.app.state.api
    assert isinstance(state, ApiState)
    return state


State = Annotated[ApiState, Depends(state_of)]
