"""Between a sequence of APT's and a request of vLLM's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from apt_core.errors import AptError, InvalidRequestError
from apt_serve.engine.client import (
    EngineOverloadedError,
    FinishReason,
    GenerationFailedError,
    Logprob,
    TokenLogprobs,
)
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import SequenceOutput

if TYPE_CHECKING:
    from vllm.logprobs import Logprob as VllmLogprob
    from vllm.outputs import RequestOutput

log = logging.getLogger(__name__)

_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "abort",
    "error": "error",
    "repetition": "stop",
}


def sampling_arguments(seq: Sequence, eos_token_ids: frozenset[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for one choice.

    vLLM samples, and ends a generation at its stop tokens and its length. Text and stop strings are the business of
    APT's output processor: vLLM drops the bytes of a character that never became complete, would show an end-of-
    sequence token when it is to show stop strings, and needs another tokenizer for both.
    """
    sampling = seq.sampling
    stop_token_ids = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stop_token_ids |= eos_token_ids
    return {
        "temperature": 0.0 if sampling.is_greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        # vLLM's own random streams unless one was asked for: a seed takes a slower way to sample. -1 would mean none.
        "seed": None if sampling.seed is None else seq.seed % 2**63,
        "stop_token_ids": sorted(stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens,
        "max_tokens": max(seq.max_tokens, 1),  # a prompt is not scored without generating; see sequence_output
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "detokenize": False,
    }


def sequence_output(seq: Sequence, output: RequestOutput) -> SequenceOutput:
    """What a delta of vLLM's says of the sequence's new tokens; the first comes when the prompt is computed."""
    [completion] = output.outputs
    seq.num_cached_tokens = output.num_cached_tokens or 0
    token_ids = tuple(completion.token_ids) if seq.max_tokens else ()
    logprobs = None
    if completion.logprobs is not None and seq.sampling.logprobs is not None:
        logprobs = tuple(
            _token_logprobs(token_id, entry, seq.sampling.logprobs)
            for token_id, entry in zip(token_ids, completion.logprobs, strict=False)
            if entry is not None
        )
    prompt_logprobs = _prompt_logprobs(seq, output.prompt_logprobs)
    return SequenceOutput(seq.seq_id, token_ids, seq.num_tokens, logprobs, prompt_logprobs)


def finish_reason(output: RequestOutput) -> FinishReason | None:
    """Why vLLM ended the sequence, if it did."""
    reason = output.outputs[0].finish_reason
    return None if reason is None else _FINISH_REASONS.get(reason, "error")


def as_failure(error: Exception) -> AptError:
    """What the reader of a choice is told of an exception of vLLM's."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    if isinstance(error, VLLMClientError):
        return InvalidRequestError(f"vLLM refuses this request: {error}", param=getattr(error, "parameter", None))
    if isinstance(error, GracefulHTTPError):  # limits of vLLM's own, if vllm_args asks for any
        return EngineOverloadedError(str(error), retry_after_s=1.0)
    log.error("vLLM failed", exc_info=error)
    return GenerationFailedError("vLLM failed while it computed this request.")


def _prompt_logprobs(
    seq: Sequence, entries: Iterable[Mapping[int, VllmLogprob] | None] | None
) -> tuple[TokenLogprobs, ...] | None:
    """One for each prompt token after the first, which has none."""
    num_top = seq.sampling.prompt_logprobs
    if num_top is None or not entries:
        return None
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    return tuple(
        _token_logprobs(token_id, entry, num_top)
        for token_id, entry in zip(prompt, entries, strict=True)
        if entry is not None
    )


def _token_logprobs(chosen: int, entry: Mapping[int, VllmLogprob], num_top: int) -> TokenLogprobs:
    """The entry holds the most likely tokens, ranked from 1, and the chosen one, which may or may not be among them."""
    ranked = sorted(((token.rank or 0, token_id) for token_id, token in entry.items()))
    top = [Logprob(token_id, entry[token_id].logprob) for rank, token_id in ranked if 1 <= rank <= num_top]
    return TokenLogprobs(Logprob(chosen, entry[chosen].logprob), tuple(top))
