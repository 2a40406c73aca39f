"""The served models, as OpenAI lists them and in short."""

from __future__ import annotations

from fastapi import APIRouter, Response

from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.openapi import errors
from apt_serve.api.schemas.simple import ModelCard, ModelList, ModelSummaries, ModelSummary
from apt_serve.api.state import State
from apt_serve.engine.client import ModelInfo

router = APIRouter(dependencies=[needs(Scope.INFERENCE)])


@router.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
async def list_models(state: State, caller: Caller) -> Response:
    """All served models that the caller may use."""
    models = [state.engine.model]
    return ModelList(object="list", data=[_card(each) for each in models if caller.may_use(each.name)]).response()


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(404), tags=["OpenAI"])
async def get_model(model: str, state: State, caller: Caller) -> Response:
    """One served model."""
    return _card(state.engine_for(caller, model).model).response()


@router.get("/models", response_model=ModelSummaries, tags=["Simple"])
async def summarize_models(state: State, caller: Caller) -> Response:
    """All served models that the caller may use, and what they can do."""
    model = state.engine.model
    if not caller.may_use(model.name):
        return ModelSummaries(models=[]).response()
    summary = ModelSummary(
        name=model.name,
        max_model_len=model.max_model_len,
        weight_version=model.weight_version,
        vocab_size=model.vocab_size,
        has_chat_template=model.tokenizer.has_chat_template,
        capabilities=sorted(state.engine.capabilities),
    )
    return ModelSummaries(models=[summary]).response()


def _card(model: ModelInfo) -> ModelCard:
    return ModelCard(
        id=model.name,
        object="model",
        created=model.created,
        owned_by="apt",
        max_model_len=model.max_model_len,
        weight_version=model.weight_version,
    )
