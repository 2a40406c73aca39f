"""LLM: the same engine in Python, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apt_core.errors import ConfigError
from apt_serve.engine.client import FinishReason, GenerationRequest, TokenLogprobs
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.engine import Engine, SequenceDelta
from apt_serve.engine.sampling_params import SamplingParams


@dataclass(slots=True)
class Completion:
    """One finished choice."""

    index: int
    """Which of the prompt's n choices."""
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One per token id, if asked for."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class PromptResult:
    """A prompt and its n choices."""

    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None
    """One per prompt token, if asked for; the first token has None."""
    num_cached_tokens: int
    """Prompt tokens that the prefix cache supplied to the first choice."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """Output tokens of the first choice."""
        return self.completions[0].token_ids


class LLM:
    """Offline inference.

    >>> llm = LLM("smollm2-135m-instruct", dtype="float32")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4))[0].text

    Args:
        source: embedded model, Hugging Face folder, .gguf file or hub id; see EngineConfig.source.
        settings: any other field of EngineConfig.
    """

    def __init__(self, source: str = EMBEDDED_MODEL, **settings: Any) -> None:
        config = EngineConfig(source=source, **settings)
        if config.engine != "native":
            raise ConfigError("LLM runs the native engine; vLLM has a class LLM of its own", field="engine")
        self.engine = Engine(config)
        self.model = self.engine.model
        self.tokenizer = self.model.tokenizer

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[PromptResult]:
        """Continue one prompt or many, all batched together.

        Args:
            prompts: text or token ids, one or a list of them.
            sampling: for all prompts, or one for each.

        Returns:
            One result per prompt, in their order.

        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served; nothing is started then.
        """
        token_ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(token_ids)
        requests = [
            GenerationRequest(str(i), ids, params)
            for i, (ids, params) in enumerate(zip(token_ids, sampling, strict=True))
        ]
        for request in requests:
            self.engine.check(request)
        return self._run(requests)

    def chat(self, messages: Sequence[dict[str, Any]], sampling: SamplingParams | None = None) -> PromptResult:
        """Answer one conversation of {"role", "content"} messages by the model's chat template."""
        prompt = self.tokenizer.apply_chat_template(messages)
        return self.generate(self.tokenizer.encode(prompt, add_special_tokens=False), sampling)[0]

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _run(self, requests: list[GenerationRequest]) -> list[PromptResult]:
        deltas: dict[str, list[SequenceDelta]] = {}
        seq_ids: list[list[str]] = []
        for request in requests:
            sequences = self.engine.sequences_of(request)
            seq_ids.append([seq.seq_id for seq in sequences])
            for seq in sequences:
                deltas[seq.seq_id] = []
                self.engine.add(seq)
        while self.engine.has_work:
            for delta in self.engine.step():
                deltas[delta.seq_id].append(delta)
        return [
            _result(request, [deltas[seq_id] for seq_id in ids]) for request, ids in zip(requests, seq_ids, strict=True)
        ]


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _result(request: GenerationRequest, choices: list[list[SequenceDelta]]) -> PromptResult:
    scored = [d.output.prompt_logprobs for d in choices[0] if d.output.prompt_logprobs is not None]
    return PromptResult(
        prompt_token_ids=list(request.prompt_token_ids),
        completions=[_completion(deltas) for deltas in choices],
        prompt_logprobs=list(scored[0]) if scored else None,
        num_cached_tokens=choices[0][0].output.num_cached_tokens,
    )


def _completion(deltas: list[SequenceDelta]) -> Completion:
    outputs = [delta.output for delta in deltas]
    has_logprobs = any(output.logprobs is not None for output in outputs)
    return Completion(
        index=outputs[0].index,
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=[entry for output in outputs for entry in output.logprobs or ()] if has_logprobs else None,
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
    )
