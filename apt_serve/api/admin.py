"""/admin/weights: new weights while requests run. Only there with access control or an admin token."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from apt_core.manifest import MANIFEST
from apt_serve.api.admin_route import AdminJsonRoute, AdminRoute
from apt_serve.api.current_weights import is_allowed
from apt_serve.api.errors import ApiError
from apt_serve.api.handover import Refusal
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.admin import WeightsRequest, WeightsResponse
from apt_serve.api.state import State
from apt_serve.config import AdminConfig
from apt_serve.engine.handover import SwapOrder

_REFUSALS = {
    Refusal.RUNNING: "Another swap has not ended.",
    Refusal.UNSUPPORTED: "This engine cannot change its weights while it runs; replace the replica.",
}

router = APIRouter(tags=["Operations"])
reading = APIRouter(route_class=AdminRoute)
writing = APIRouter(route_class=AdminJsonRoute)


@reading.get("/admin/weights", response_model=WeightsResponse, responses=errors(401, 403, 503))
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
