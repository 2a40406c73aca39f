"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from apt_core.errors import InvalidRequestError
from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.json_route import JsonRoute
from apt_serve.api.openapi import BODY_ERRORS, errors
from apt_serve.api.prompts import chat_text, encode
from apt_serve.api.schemas.simple import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from apt_serve.api.state import State
from apt_serve.engine.client import ModelInfo

router = APIRouter(route_class=JsonRoute, tags=["Tokenization"], dependencies=[needs(Scope.INFERENCE)])


@router.post("/tokenize", response_model=TokenizeResponse, responses=BODY_ERRORS | errors(503))
async def tokenize(body: TokenizeRequest, request: Request, state: State, caller: Caller) -> Response:
    """Token ids of a text, or of the prompt that a conversation stands for."""
    model = (await state.engine_of(request, caller, body.model)).model
    text, adds_by_default = _text(model, body)
    add_special_tokens = adds_by_default if body.add_special_tokens is None else body.add_special_tokens
    tokens = await encode(model.tokenizer, text, add_special_tokens=add_special_tokens)
    return TokenizeResponse(count=len(tokens), max_model_len=model.max_model_len, tokens=list(tokens)).response()


@router.post("/detokenize", response_model=DetokenizeResponse, responses=BODY_ERRORS | errors(503))
async def detokenize(body: DetokenizeRequest, request: Request, state: State, caller: Caller) -> Response:
    """Text of token ids."""
    model = (await state.engine_of(request, caller, body.model)).model
    for token in body.tokens:
        if token >= model.tokenizer.vocab_size:
            raise InvalidRequestError(f"{token} is not a token of this model", param="tokens")
    return DetokenizeResponse(prompt=model.tokenizer.decode(body.tokens, skip_special_tokens=False)).response()


def _text(model: ModelInfo, body: TokenizeRequest) -> tuple[str, bool]:
    """The text, and whether it still needs the tokenizer's own prefix: a chat template writes that itself."""
    if body.prompt is not None and body.messages is None:
        return body.prompt, True
    if body.messages is not None and body.prompt is None:
        return chat_text(model, body.messages), False
    raise InvalidRequestError("give exactly one of prompt and messages", param="prompt")
