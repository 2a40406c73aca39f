"""The served models, as OpenAI lists them and in short."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from apt_serve.access.authenticator import require_model
from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.errors import model_not_found
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.simple import ModelCard, ModelList, ModelSummaries, ModelSummary
from apt_serve.api.state import ApiState, State
from apt_serve.engine.client import EngineClient

router = APIRouter(dependencies=[needs(Scope.INFERENCE)])

_STARTED_AT = int(time.time())
"""When a model was made that has not been loaded, as far as anybody can tell."""


@router.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
async def list_models(state: State, caller: Caller) -> Response:
    """All served models that the caller may use."""
    cards = [_card(name, engine) for name, engine in engines(state).items() if caller.may_use(name)]
    return ModelList(object="list", data=cards).response()


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(404), tags=["OpenAI"])
async def get_model(model: str, state: State, caller: Caller) -> Response:
    """One served model."""
    require_model(caller, model)
    known = engines(state)
    if model not in known:
        raise model_not_found(model)
    return _card(model, known[model]).response()


@router.get("/models", response_model=ModelSummaries, tags=["Simple"])
async def summarize_models(state: State, caller: Caller) -> Response:
    """All served models that the caller may use, and what they can do."""
    models = [_summary(name, engine) for name, engine in engines(state).items() if caller.may_use(name)]
    return ModelSummaries(models=models).response()


def engines(state: ApiState) -> dict[str, EngineClient | None]:
    """Every model, the default one first; None for one that is not loaded. To be asked about them alone."""
    return {state.engine.model.name: state.engine} | {name: state.models.engine(name) for name in state.models.others}


def _card(name: str, engine: EngineClient | None) -> ModelCard:
    model = None if engine is None else engine.model
    return ModelCard(
        id=name,
        object="model",
        created=_STARTED_AT if model is None else model.created,
        owned_by="apt",
        max_model_len=None if model is None else model.max_model_len,
        weight_version=None if model is None else model.weight_version,
        loaded=model is not None,
    )


def _summary(name: str, engine: EngineClient | None) -> ModelSummary:
    model = None if engine is None else engine.model
    return ModelSummary(
        name=name,
        loaded=model is not None,
        max_model_len=None if model is None else model.max_model_len,
        weight_version=None if model is None else model.weight_version,
        vocab_size=None if model is None else model.vocab_size,
        has_chat_template=None if model is None else model.tokenizer.has_chat_template,
        capabilities=[] if engine is None else sorted(engine.capabilities),
    )
