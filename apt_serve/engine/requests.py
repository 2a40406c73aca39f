"""From a request to sequences, and what no engine could serve."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import replace

from apt_core.errors import InvalidRequestError
from apt_serve.engine.client import GenerationRequest, ModelInfo
from apt_serve.engine.sequence import Sequence


def make_sequences(request: GenerationRequest, model: ModelInfo, arrival_order: int) -> list[Sequence]:
    """One new sequence for each of the request's choices.

    Only the first choice scores the prompt. The others' random streams follow from the request's seed.

    Args:
        request: one that ``check_request`` accepts.
        model: who will serve it.
        arrival_order: another number for each request.
    """
    sampling = request.sampling
    max_tokens = model.max_model_len - len(request.prompt_token_ids)
    if sampling.max_tokens is not None:
        max_tokens = min(max_tokens, sampling.max_tokens)
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    return [
        Sequence(
            seq_id=f"{arrival_order}-{index}",
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=sampling if index == 0 else replace(sampling, prompt_logprobs=None),
            seed=seed + index,
            max_tokens=max_tokens,
            index=index,
            priority=request.priority,
            arrival_time=time.monotonic(),
            arrival_order=arrival_order,
            tenant=request.tenant,
            extra_keys=(request.cache_salt,) if request.cache_salt else (),
            weight_version=request.weight_version or model.weight_version,
        )
        for index in range(sampling.n)
    ]


def check_request(request: GenerationRequest, model: ModelInfo) -> None:
    """Refuse a request that the model could never serve.

    Raises:
        InvalidRequestError: names the field.
    """
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise InvalidRequestError("The prompt is empty.", param="prompt")
    if sampling.n > model.max_num_choices:
        raise InvalidRequestError(f"n must be at most {model.max_num_choices} on this server.", param="n")
    _check_token_ids(prompt, "prompt", model.vocab_size)
    _check_token_ids(sampling.logit_bias, "logit_bias", model.vocab_size)
    _check_token_ids(sampling.stop_token_ids, "stop_token_ids", model.vocab_size)
    room = model.max_model_len - len(prompt)
    needed = 1 if sampling.max_tokens is None else sampling.max_tokens
    if room < min(needed, 1):
        raise InvalidRequestError(
            f"This model's maximum context length is {model.max_model_len} tokens; the prompt has {len(prompt)}.",
            param="prompt",
            code="context_length_exceeded",
        )
    if room < needed:
        raise InvalidRequestError(
            f"This model's maximum context length is {model.max_model_len} tokens; the prompt has {len(prompt)} "
            f"and max_tokens asks for {needed} more.",
            param="max_tokens",
            code="context_length_exceeded",
        )


def _check_token_ids(token_ids: Iterable[int], param: str, vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"Token id {token_id} is not between 0 and {vocab_size - 1}.", param=param)
