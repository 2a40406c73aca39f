"""/admin/models: load and unload further models by hand. Only there with access control or an admin token."""

from __future__ import annotations

from fastapi import APIRouter, Response

from apt_serve.api.admin_route import AdminRoute
from apt_serve.api.errors import ApiError, model_not_found
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.admin_models import ModelsResponse
from apt_serve.api.state import ApiState, State

router = APIRouter(route_class=AdminRoute, tags=["Operations"])


@router.get("/admin/models", response_model=ModelsResponse, responses=errors(401, 403, 503))
async def get_models(state: State) -> Response:
    """What is loaded on every replica, and what uses it."""
    return ModelsResponse.of(await state.model_fleet.models()).response()


@router.post(
    "/admin/models/{model:path}/load",
    status_code=202,
    response_model=ModelsResponse,
    responses=errors(401, 403, 404, 503),
)
async def load_model(model: str, state: State) -> Response:
    """Begin to load a model on every replica; GET tells how it goes. Does nothing where it is loaded."""
    _require_known(state, model)
    replicas = await (state.model_fleet.load_model(model) if _is_other(state, model) else state.model_fleet.models())
    answer = ModelsResponse.of(replicas).response()
    answer.status_code = 202
    return answer


@router.post(
    "/admin/models/{model:path}/unload",
    response_model=ModelsResponse,
    responses=errors(401, 403, 404, 409, 503),
)
async def unload_model(model: str, state: State) -> Response:
    """Unload a model on every replica; 409 if requests use it on one of them. The next request loads it again."""
    _require_known(state, model)
    if not _is_other(state, model):
        raise ApiError(409, f"The default model {model!r} stays loaded.", code="model_in_use")
    replicas = await state.model_fleet.unload_model(model)
    for replica in replicas:
        if replica.refusal is not None:
            raise ApiError(409, replica.refusal, code="model_in_use")
    return ModelsResponse.of(replicas).response()


def _require_known(state: ApiState, model: str) -> None:
    if model != state.engine.model.name and not _is_other(state, model):
        raise model_not_found(model)


def _is_other(state: ApiState, model: str) -> bool:
    return model in state.models.others
