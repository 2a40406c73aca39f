"""What every handler needs: settings, engine, metrics, and whether the server is up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection, Request

from apt_serve.access.authenticator import Authenticator, require_model
from apt_serve.access.identity import Identity
from apt_serve.api import observe
from apt_serve.api.errors import model_not_found
from apt_serve.api.formatting import Envelope
from apt_serve.api.generation import Batches, Job, Origin, run_job
from apt_serve.api.handover import Fleet
from apt_serve.api.leases import leases_of
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.model_fleet import ModelFleet
from apt_serve.api.observe import Observer
from apt_serve.api.served_models import ServedModels
from apt_serve.api.streaming import while_connected
from apt_serve.config import ServerConfig
from apt_serve.engine.client import EngineClient
from apt_serve.jobs.service import JobService
from apt_serve.limits.limiter import Limiter
from apt_serve.records.database import Database
from apt_serve.usage.ledger import UsageLedger


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
    """Of the default model."""
    metrics: PrometheusMetrics
    fleet: Fleet
    """For new weights."""
    jobs: JobService
    """Files, batches and jobs."""
    database: Database
    access: Authenticator
    limiter: Limiter
    """How much callers may take."""
    usage: UsageLedger
    """What they have taken."""
    observer: Observer
    """Told of every request that has ended, and of every fault."""
    models: ServedModels
    """The default model and the others."""
    model_fleet: ModelFleet
    """For loading and unloading by hand."""
    phase: Phase = Phase.STARTING

    async def start(self) -> None:
        """Load the model and make ready."""
        self.observer.start()
        self.access.start()
        self.usage.start()
        await self.engine.start()
        await self.models.start()
        self.phase = Phase.READY
        await self.jobs.start()

    async def stop(self) -> None:
        """Refuse new requests, let running ones finish within the grace period, abort the rest."""
        self.phase = Phase.STOPPING
        await self.jobs.stop()
        grace_s = self.config.api.shutdown_grace_s
        await asyncio.gather(self.engine.stop(grace_s), self.models.stop(grace_s))
        await self.access.stop()
        await self.limiter.close()
        await self.usage.stop()
        await self.database.close()
        await self.observer.close()

    def engine_for(self, caller: Identity, model: str | None) -> EngineClient:
        """The engine of the default model.

        Raises:
            PermissionDeniedError: the caller may not use the model, whether or not it is there.
            ApiError: the model is another one.
        """
        require_model(caller, model if model is not None else self.engine.model.name)
        if model is not None and model != self.engine.model.name:
            raise model_not_found(model)
        return self.engine

    async def engine_of(self, request: Request, caller: Identity, model: str | None) -> EngineClient:
        """The engine that serves a model; one that is not the default stays loaded until the request is answered.

        Raises:
            PermissionDeniedError, ApiError: as ``engine_for``.
            ModelLoadError, ModelBusyError, EngineStoppedError: as ``ModelCache.get_model``.
            ClientDisconnect: the client left meanwhile.
        """
        other = self._other(caller, model)
        if other is None:
            return self.engine_for(caller, model)
        leases, lease = leases_of(request), self.models.lease_now(other)
        if lease is not None:
            leases.append(lease)
            return lease.engine

        async def take() -> None:  # puts it where it is released in the step in which it is given
            leases.append(await self.models.lease(other))

        await while_connected(request.receive, take())
        return leases[-1].engine

    @asynccontextmanager
    async def using(self, caller: Identity, model: str | None) -> AsyncIterator[EngineClient]:
        """The same for as long as a block lasts, where there is no HTTP request."""
        other = self._other(caller, model)
        if other is None:
            yield self.engine_for(caller, model)
        else:
            async with await self.models.lease(other) as engine:
                yield engine

    def _other(self, caller: Identity, model: str | None) -> str | None:
        """The model, if it is one that must be leased, and its caller may use it."""
        if model not in self.config.models.others:
            return None
        require_model(caller, model)
        observe.addressed(model)
        return model

    def origin(self, caller: Identity, cache_salt: str | None = None, *, model: str | None = None) -> Origin:
        """What the engine is told of a caller.

        Args:
            cache_salt: the client's own: it shares prefixes with requests that give the same one alone.
            model: whose engine; None: the default one's.
        """
        if self.config.settings_of(model).share_prefixes == "tenant":
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
        return Envelope(job, settings=repr(self.config.settings_of(job.model)))


def state_of(connection: HTTPConnection) -> ApiState:
    """The state of the app that a connection belongs to."""
    state = connection.app.state.api
    assert isinstance(state, ApiState)
    return state


State = Annotated[ApiState, Depends(state_of)]
