"""From messages to the bodies that HTTP has: what they may say is checked in one place."""

from __future__ import annotations

from typing import Any, Final

from apt_core.errors import InvalidRequestError
from apt_serve.api.schemas.chat import ChatCompletionRequest
from apt_serve.api.schemas.completions import CompletionRequest
from apt_serve.rpc.inference_pb2 import ChatRequest, GenerateRequest, Sampling

_SAMPLING: Final = tuple(field.name for field in Sampling.DESCRIPTOR.fields)
NAMES: Final = {name: f"sampling.{name}" for name in _SAMPLING} | {
    "max_completion_tokens": "sampling.max_tokens",
    "top_logprobs": "sampling.logprobs",
}
"""What messages call the fields of bodies, where that is something else."""


def completion_body(request: GenerateRequest) -> CompletionRequest:
    """The body of the same completion.

    Raises:
        InvalidRequestError, ValidationError: a value is outside its range; the field is named as NAMES' keys.
    """
    match request.WhichOneof("prompt"):
        case "text":
            prompt: str | list[int] = request.text
        case "token_ids":
            prompt = list(request.token_ids.ids)
        case _:
            raise InvalidRequestError(
                "prompt: give text or token_ids", param="prompt", code="missing_required_parameter"
            )
    body = _common(request) | _sampling(request.sampling) | {"prompt": prompt}
    if body.get("max_tokens") == 0:
        raise InvalidRequestError("max_tokens must be at least 1, got 0", param="max_tokens")
    if request.HasField("add_special_tokens"):
        body["add_special_tokens"] = request.add_special_tokens
    return CompletionRequest.model_validate(body)


def chat_body(request: ChatRequest) -> ChatCompletionRequest:
    """The body of the same chat completion.

    Raises:
        ValidationError: a value is outside its range; the field is named as NAMES' keys.
    """
    sampling = _sampling(request.sampling)
    if "logprobs" in sampling:
        sampling |= {"logprobs": True, "top_logprobs": sampling["logprobs"]}
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    return ChatCompletionRequest.model_validate(_common(request) | sampling | {"messages": messages})


def _common(request: GenerateRequest | ChatRequest) -> dict[str, Any]:
    body: dict[str, Any] = {name: getattr(request, name) for name in ("model", "cache_salt") if getattr(request, name)}
    if request.HasField("priority"):
        body["priority"] = request.priority
    return body


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """What was set."""
    given: dict[str, Any] = {field.name: value for field, value in sampling.ListFields()}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = list(given[name])
    if "logit_bias" in given:
        given["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    return given
