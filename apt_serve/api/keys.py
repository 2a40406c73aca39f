"""/admin/keys: API keys over HTTP."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from apt_serve.access.key_store import KeyGrant
from apt_serve.api.admin_route import AdminJsonRoute, AdminRoute
from apt_serve.api.openapi import BODY_ERRORS, errors
from apt_serve.api.schemas.keys import KeyInfo, KeyList, KeyRequest, NewKey, RotateRequest
from apt_serve.api.state import State

router = APIRouter(tags=["Operations"])
reading = APIRouter(route_class=AdminRoute)
writing = APIRouter(route_class=AdminJsonRoute)

_ERRORS = errors(401, 403, 503)
_NOT_KEPT = {"Cache-Control": "no-store"}


@reading.get("/admin/keys", response_model=KeyList, responses=_ERRORS)
async def list_keys(state: State, owner: str | None = None) -> Response:
    """All keys, or an owner's, without their secrets; ended ones included."""
    records = await state.access.list_keys(owner)
    return KeyList(object="list", data=[KeyInfo.of(record) for record in records]).response()


@writing.post("/admin/keys", status_code=201, response_model=NewKey, responses=BODY_ERRORS | _ERRORS | errors(409))
async def create_key(body: KeyRequest, state: State) -> Response:
    """Make a key. Its text is in this answer alone."""
    grant = KeyGrant(
        body.owner,
        body.name,
        frozenset(body.scopes),
        None if body.models is None else frozenset(body.models),
        body.tenant_class,
        None if body.expires_in_s is None else time.time() + body.expires_in_s,
    )
    return _created(NewKey.made(*await state.access.create_key(grant)))


@writing.post(
    "/admin/keys/{key_id}/rotate",
    status_code=201,
    response_model=NewKey,
    responses=BODY_ERRORS | _ERRORS | errors(409),
)
async def rotate_key(key_id: str, body: RotateRequest, state: State) -> Response:
    """Make another key for the same; the old one works for a while longer."""
    return _created(NewKey.made(*await state.access.rotate_key(key_id, body.overlap_s)))


@reading.delete("/admin/keys/{key_id}", response_model=KeyInfo, responses=_ERRORS | errors(404))
async def revoke_key(key_id: str, state: State) -> Response:
    """End a key at once, and what runs on it within a few seconds."""
    return KeyInfo.of(await state.access.revoke_key(key_id)).response()


def _created(key: NewKey) -> Response:
    answer = key.response()
    answer.status_code = 201
    answer.headers.update(_NOT_KEPT)
    return answer


router.include_router(reading)
router.include_router(writing)
