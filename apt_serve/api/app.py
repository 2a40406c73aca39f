"""The FastAPI application over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from apt_core.errors import AptError
from apt_serve.api import (
    admin,
    chat,
    completions,
    generate,
    health,
    metrics,
    models,
    openapi,
    tokenization,
    unavailable,
    websocket,
)
from apt_serve.api.errors import CLIENT_CLOSED_REQUEST, ApiError, RequestTimeoutError, as_api_error
from apt_serve.api.handover import Fleet, Handover
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.middleware import (
    REQUEST_ID_HEADER,
    BodyLimitMiddleware,
    LastResortMiddleware,
    RequestIdMiddleware,
)
from apt_serve.api.state import ApiState
from apt_serve.api.streaming import WEIGHT_VERSION_HEADER
from apt_serve.config import ApiConfig, ServerConfig
from apt_serve.engine.client import EngineClient

_ROUTERS = (completions, chat, models, generate, tokenization, health, metrics, websocket, unavailable)


def create_app(
    config: ServerConfig,
    engine: EngineClient,
    prometheus: PrometheusMetrics,
    *,
    runs_engine: bool = True,
    is_behind_serve: bool = False,
    fleet: Fleet | None = None,
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

    Raises:
        ConfigError: the admin token in the environment is too short.
    """
    admin_token = config.admin.bearer_token
    state = ApiState(config, engine, prometheus, fleet or Handover(config, engine, prometheus), admin_token)
    prometheus.watch(engine)
    app = FastAPIOffline(  # /docs works without a network
        redoc_url=None,
        title=openapi.TITLE,
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        lifespan=_lifespan if runs_engine else None,
        middleware=_middleware(config.api, is_behind_serve),
        exception_handlers={
            kind: _answer_error for kind in (HTTPException, RequestValidationError, RequestTimeoutError, AptError)
        },
        redirect_slashes=False,
    )
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.state.api = state
    for module in _ROUTERS:
        app.include_router(module.router)
    if admin_token is not None:
        app.include_router(admin.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ApiState = app.state.api
    await state.start()
    try:
        yield
    finally:
        await state.stop()


def _middleware(config: ApiConfig, is_behind_serve: bool) -> list[Middleware]:
    """Outermost first: errors of the inner ones still get their request id and CORS headers."""
    layers = [Middleware(RequestIdMiddleware, is_behind_serve)]
    if config.cors_allow_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_allow_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID_HEADER, WEIGHT_VERSION_HEADER, "Retry-After"],
            )
        )
    return [*layers, Middleware(LastResortMiddleware), Middleware(BodyLimitMiddleware, config.max_body_bytes)]


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    if answer.code == "not_found":
        answer = ApiError(404, f"There is no {request.method} {request.url.path} here.", code="not_found")
    state: ApiState = request.app.state.api
    if request.method == "POST":  # a failed health check is no rejected request
        state.metrics.rejected(answer.reason)
    return answer.response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
