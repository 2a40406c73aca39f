"""Endpoints of OpenAI's that clients try and APT does not have: said by name, so that nobody looks for a wrong URL."""

from __future__ import annotations

from fastapi import APIRouter, Response

from apt_serve.access.identity import Scope
from apt_serve.api.access import needs
from apt_serve.api.errors import ApiError

router = APIRouter(include_in_schema=False, dependencies=[needs(Scope.INFERENCE)])


@router.post("/v1/embeddings")
async def embeddings() -> Response:
    """Refuse: the served models generate text."""
    raise ApiError(404, "Embeddings are not available on this server.", code="not_available")


@router.post("/v1/responses")
async def responses() -> Response:
    """Refuse: there is one way to chat."""
    raise ApiError(404, "The Responses API is not available; use /v1/chat/completions.", code="not_available")
