"""From a job's deltas to messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from apt_core.tokenizer import Tokenizer
from apt_serve.api.generation import ChoiceDelta, Job
from apt_serve.api.schemas.common import Usage as BodyUsage
from apt_serve.engine.client import Logprob as EngineLogprob
from apt_serve.engine.client import TokenLogprobs as EngineLogprobs
from apt_serve.rpc.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Choice,
    FinishReason,
    Generation,
    Logprob,
    TokenLogprobs,
    Usage,
)

_FINISH_REASONS: Final[dict[str, FinishReason.ValueType]] = {
    "stop": FINISH_REASON_STOP,
    "length": FINISH_REASON_LENGTH,
}


class Answer:
    """Makes the messages of one generation."""

    def __init__(self, request_id: str, job: Job, tokenizer: Tokenizer, *, shows_prompt: bool) -> None:
        self._request_id = request_id
        self._job = job
        self._tokenizer = tokenizer
        self._num_top = job.requests[0].sampling.logprobs
        self._shows_prompt = shows_prompt

    def message(self, deltas: Sequence[ChoiceDelta], usage: BodyUsage | None) -> Generation:
        """What is new, at most one delta per choice; the first message may show the prompt."""
        message = Generation(
            request_id=self._request_id,
            model=self._job.model,
            created=self._job.created,
            weight_version=deltas[0].output.weight_version,
            choices=[self._choice(delta) for delta in deltas],
            prompt_token_ids=self._job.prompts[0].token_ids if self._shows_prompt else (),
        )
        self._shows_prompt = False
        if usage is not None:
            message.usage.CopyFrom(_usage(usage))
        return message

    def _choice(self, delta: ChoiceDelta) -> Choice:
        output = delta.output
        choice = Choice(index=delta.choice, text=output.text, token_ids=output.token_ids)
        if self._num_top is not None:
            choice.logprobs.extend(self._logprobs(entry, self._num_top) for entry in output.logprobs or ())
        if output.finish_reason is not None:
            choice.finish_reason = _FINISH_REASONS[output.finish_reason]
        if isinstance(output.stop_reason, str):
            choice.stop_string = output.stop_reason
        elif output.stop_reason is not None:
            choice.stop_token_id = output.stop_reason
        return choice

    def _logprobs(self, entry: EngineLogprobs, num_top: int) -> TokenLogprobs:
        return TokenLogprobs(
            chosen=self._logprob(entry.chosen), top=[self._logprob(each) for each in entry.top[:num_top]]
        )

    def _logprob(self, each: EngineLogprob) -> Logprob:
        token = self._tokenizer.token_bytes(each.token_id)
        return Logprob(token_id=each.token_id, token=token, logprob=each.logprob)


def _usage(usage: BodyUsage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.prompt_tokens_details.cached_tokens,
    )
