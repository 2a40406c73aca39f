"""The FastAPI application over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from apt_core.errors import AptError
from apt_serve.access.authenticator import Authenticator
from apt_serve.api import (
    admin,
    admin_models,
    batches,
    chat,
    completions,
    files,
    generate,
    health,
    jobs,
    keys,
    metrics,
    models,
    openapi,
    tokenization,
    unavailable,
    usage,
    websocket,
)
from apt_serve.api.access import AccessMiddleware
from apt_serve.api.address_limit import AddressLimitMiddleware
from apt_serve.api.errors import CLIENT_CLOSED_REQUEST, ApiError, RequestTimeoutError, as_api_error
from apt_serve.api.handover import Fleet, Handover
from apt_serve.api.leases import LeaseMiddleware
from apt_serve.api.limited import LimitHeadersMiddleware
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.middleware import (
    REQUEST_ID_HEADER,
    BodyLimitMiddleware,
    LastResortMiddleware,
    RequestIdMiddleware,
)
from apt_serve.api.model_fleet import ModelFleet
from apt_serve.api.observe import ObserveMiddleware, Observer, addressed_model, routed
from apt_serve.api.served_models import ServedModels
from apt_serve.api.state import ApiState
from apt_serve.api.streaming import WEIGHT_VERSION_HEADER
from apt_serve.config import ServerConfig
from apt_serve.engine.client import EngineClient
from apt_serve.jobs.service import JobService
from apt_serve.limits.limiter import RATE_LIMIT_HEADERS, Limiter
from apt_serve.records.database import Database
from apt_serve.usage.ledger import UsageLedger
from apt_serve.usage.store import UsageStore

_ROUTERS = (
    completions,
    chat,
    models,
    generate,
    tokenization,
    files,
    batches,
    jobs,
    health,
    metrics,
    websocket,
    unavailable,
)
_MULTIPART_BYTES = 64 * 1024
"""Around a file in the body of an upload."""


def create_app(
    config: ServerConfig,
    engine: EngineClient,
    prometheus: PrometheusMetrics,
    *,
    runs_engine: bool = True,
    is_behind_serve: bool = False,
    fleet: Fleet | None = None,
    models: ServedModels | None = None,
    model_fleet: ModelFleet | None = None,
) -> FastAPI:
    """The application over an engine.

    Args:
        config: settings of the server.
        engine: not yet started.
        prometheus: the sink that the engine reports to.
        runs_engine: the lifespan starts and stops the engine; else whoever runs the app calls ``start`` and ``stop`` of
            ``app.state.api``.
        is_behind_serve: Ray Serve puts request ids on responses by itself.
        fleet: all replicas that new weights go to; None: this one has no others.
        models: the further models beside the engine's; None: made of the settings.
        model_fleet: all replicas that load and unload models by hand; None: this one has no others.

    Raises:
        ConfigError: the admin token in the environment is too short, a key of access control cannot be read, or the URL
            of Redis is none.
    """
    admin_token = config.admin.bearer_token
    database = Database(config.records)
    access = Authenticator(config.access, config.records, database, admin_token)
    prometheus.watch(engine)
    prometheus.know_classes(config.limits.classes)
    observer = Observer(config.telemetry, prometheus, config.records)
    app = FastAPIOffline(  # /docs works without a network
        redoc_url=None,
        title=openapi.TITLE,
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        dependencies=[Depends(routed)],
        lifespan=_lifespan if runs_engine else None,
        middleware=_middleware(config, access, observer, is_behind_serve),
        exception_handlers={
            kind: _answer_error for kind in (HTTPException, RequestValidationError, RequestTimeoutError, AptError)
        },
        redirect_slashes=False,
    )
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    service = JobService(config.jobs, config.records, database, app, config.job_priority)
    prometheus.watch_jobs(service)
    fleet = fleet or Handover(config, engine, prometheus)
    limiter = Limiter(config.limits)
    prometheus.watch_limits(limiter)
    models = models or ServedModels(config, engine, prometheus)
    app.state.api = ApiState(
        config,
        engine,
        prometheus,
        fleet,
        service,
        database,
        access,
        limiter,
        UsageLedger(UsageStore(database), access.is_enabled),
        observer,
        models,
        model_fleet or models,
    )
    for module in _ROUTERS:
        app.include_router(module.router)
    if admin_token is not None or access.is_enabled:
        app.include_router(admin.router)
        app.include_router(admin_models.router)
        app.include_router(keys.router)
    if access.is_enabled:
        app.include_router(usage.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ApiState = app.state.api
    await state.start()
    try:
        yield
    finally:
        await state.stop()


def _middleware(
    config: ServerConfig, access: Authenticator, observer: Observer, is_behind_serve: bool
) -> list[Middleware]:
    """Outermost first: errors of the inner ones still get their request id and CORS headers."""
    layers = [Middleware(RequestIdMiddleware, is_behind_serve), Middleware(ObserveMiddleware, observer)]
    origins = config.api.cors_allow_origins
    if origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID_HEADER, WEIGHT_VERSION_HEADER, "Retry-After", *RATE_LIMIT_HEADERS],
            )
        )
    layers.append(Middleware(LastResortMiddleware))
    if config.limits.requests_per_minute_per_address is not None:
        layers.append(Middleware(AddressLimitMiddleware, config.limits))
    innermost = [Middleware(LeaseMiddleware)] if config.models.others else []
    uploads = {"/v1/files": config.jobs.max_file_bytes + _MULTIPART_BYTES}
    return [
        *layers,
        Middleware(AccessMiddleware, access, config.access.public_metrics),
        Middleware(LimitHeadersMiddleware),
        Middleware(BodyLimitMiddleware, config.api.max_body_bytes, uploads),
        *innermost,
    ]


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    if answer.code == "not_found":
        answer = ApiError(404, f"There is no {request.method} {request.url.path} here.", code="not_found")
    if answer.code == "method_not_allowed":  # Starlette names those of the first route with this path alone
        answer.headers = {"Allow": ", ".join(_methods_at(request))}
    state: ApiState = request.app.state.api
    if request.method == "POST":  # a failed health check is no rejected request
        state.metrics.rejected(answer.reason, addressed_model())
    return answer.response()


def _methods_at(request: Request) -> list[str]:
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in matching for method in route.methods or ()})


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
