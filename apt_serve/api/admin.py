"""/admin/weights: new weights while requests run. Only there if an admin token is configured."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from apt_core.manifest import MANIFEST
from apt_serve.api.current_weights import is_allowed
from apt_serve.api.errors import ApiError
from apt_serve.api.handover import Refusal
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.admin import WeightsRequest, WeightsResponse
from apt_serve.api.state import State, state_of
from apt_serve.config import AdminConfig
from apt_serve.engine.handover import SwapOrder

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class AdminRoute(APIRoute):
    """A route for whoever has the admin token; nothing is read of anybody else's request but its header."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler behind the check."""
        return _behind_token(super().get_route_handler())


class AdminJsonRoute(JsonRoute):
    """The same with a JSON body."""

    def get_route_handler(self) -> Handler:
        """JsonRoute's handler behind the check."""
        return _behind_token(super().get_route_handler())


def _behind_token(handle: Handler) -> Handler:
    async def check(request: Request) -> Response:
        token = state_of(request).admin_token
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_known = token is not None and secrets.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() != "bearer" or not is_known:
            raise ApiError(
                401,
                "This needs the admin token: Authorization: Bearer ...",
                type="authentication_error",
                code="invalid_admin_token",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return await handle(request)

    return check


_REFUSALS = {
    Refusal.RUNNING: "Another swap has not ended.",
    Refusal.UNSUPPORTED: "This engine cannot change its weights while it runs; replace the replica.",
}

router = APIRouter(tags=["Operations"])
reading = APIRouter(route_class=AdminRoute)
writing = APIRouter(route_class=AdminJsonRoute)


@reading.get("/admin/weights", response_model=WeightsResponse, responses=errors(401, 503))
async def get_weights(state: State) -> Response:
    """Version and latest swap of every replica."""
    return WeightsResponse.of(await state.fleet.weights()).response()


@writing.post(
    "/admin/weights",
    status_code=202,
    response_model=WeightsResponse,
    responses=errors(400, 401, 403, 409, 413, 415, 503),
)
async def swap_weights(body: WeightsRequest, state: State) -> Response:
    """Begin to load published weights; GET tells how it goes."""
    admin = state.config.admin
    order = SwapOrder(_folder(body.path, admin), body.swap or admin.swap, body.timeout_s or admin.swap_timeout_s)
    replicas = await state.fleet.begin(order)
    for replica in replicas:
        if replica.refusal is not None:
            raise ApiError(409, _REFUSALS[replica.refusal], code=replica.refusal.value)
    answer = WeightsResponse.of(replicas).response()
    answer.status_code = 202
    return answer


router.include_router(reading)
router.include_router(writing)


def _folder(name: str, admin: AdminConfig) -> Path:
    """The folder, once it is known to be one that may be loaded; what lies elsewhere is not even looked for."""
    path = Path(name)
    if "\0" in name or not path.is_absolute():
        raise ApiError(400, "path: expected an absolute path", param="path", code="invalid_value")
    if not is_allowed(path, admin):
        raise ApiError(403, "path: lies outside of admin.weight_folders", param="path", code="path_not_allowed")
    path = path.resolve()
    if not (path / MANIFEST).is_file():
        raise ApiError(400, f"path: there is no folder with a {MANIFEST}", param="path", code="invalid_value")
    if not all(is_allowed(file, admin) for file in path.iterdir()):
        problem = "path: a file in it is a link to a place outside of admin.weight_folders"
        raise ApiError(403, problem, param="path", code="path_not_allowed")
    return path
