"""An EngineClient that says what a script tells it to, and fails when a script tells it to."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from apt_core.errors import InvalidRequestError
from apt_core.manifest import version_of
from apt_serve.engine.client import (
    Capability,
    EngineOverloadedError,
    EngineStats,
    EngineStoppedError,
    GenerationFailedError,
    GenerationOutput,
    GenerationRequest,
    Logprob,
    ModelInfo,
    TokenLogprobs,
)
from apt_serve.engine.handover import SwapError, SwapOrder, SwapPhase, SwapReport, SwapRunningError
from apt_serve.engine.mailbox import Mailbox
from apt_serve.engine.metrics import FinishRecord, MetricsSink, StepRecord
from apt_serve.engine.sampling_params import SamplingParams
from tests.apt_serve.api.byte_tokenizer import EOS, ByteTokenizer

TEXT = "Once upon a time, in a café by the sea 🌊, "
"""Repeated for ever, from a place that depends on seed and choice."""


@dataclass
class Script:
    """How the engine behaves; tests change it while it runs."""

    first_delay_s: float = 0.0
    token_delay_s: float = 0.0
    fail_after: int | None = None
    """Tokens after which every generation fails."""
    is_overloaded: bool = False
    is_stopped: bool = False
    is_stalled: bool = False
    is_alive: bool = True
    swap_s: float = 0.0
    swap_error: str | None = None
    breaks_at_once: bool = False
    """An error nobody foresaw, before the first token."""


@dataclass
class ScriptedEngine:
    metrics: MetricsSink
    name: str = "scripted"
    max_model_len: int = 4096
    capabilities: frozenset[Capability] = frozenset(Capability)
    default_sampling: dict[str, float | int] = field(default_factory=dict)
    script: Script = field(default_factory=Script)
    running: set[str] = field(default_factory=set)
    seen: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Requests whose reader left before they finished."""
    num_tokens_made: int = 0
    stopped_with_grace_s: float | None = None
    swap: SwapReport | None = None

    def __post_init__(self) -> None:
        tokenizer = ByteTokenizer()
        self.model = ModelInfo(
            name=self.name,
            created=int(time.time()),
            max_num_choices=256,
            max_model_len=self.max_model_len,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer,
            eos_token_ids=frozenset({EOS}),
            default_sampling=self.default_sampling,
        )

    async def start(self) -> None:
        self.script.is_stopped = False

    async def stop(self, grace_s: float = 0.0) -> None:
        self.script.is_stopped = True
        self.stopped_with_grace_s = grace_s

    def check(self, request: GenerationRequest) -> None:
        length, sampling = len(request.prompt_token_ids), request.sampling
        if not length:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        for token in request.prompt_token_ids:
            if token >= self.model.vocab_size:
                raise InvalidRequestError(f"unknown token {token}", param="prompt")
        for name in ("logit_bias", "stop_token_ids"):
            if any(token >= self.model.vocab_size for token in getattr(sampling, name)):
                raise InvalidRequestError("unknown token", param=name)
        if length + (sampling.max_tokens or 1) > self.max_model_len:
            message = f"{length} tokens do not fit into {self.max_model_len}"
            raise InvalidRequestError(message, param="prompt", code="context_length_exceeded")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        self.check(request)
        if self.script.is_overloaded:
            raise EngineOverloadedError("too many requests wait", retry_after_s=2.5)
        if self.script.is_stopped:
            raise EngineStoppedError("the engine is stopping")
        if self.script.breaks_at_once:
            raise RuntimeError("secret detail")
        self.seen.append(request)
        self.running.add(request.request_id)
        mailbox = Mailbox(request.sampling.n)
        producer = asyncio.create_task(self._produce(request, mailbox))
        try:
            while outputs := await mailbox.take():
                for output in outputs:
                    yield output
        finally:
            if not producer.done():
                self.aborted.append(request.request_id)
            self.running.discard(request.request_id)
            producer.cancel()
            with suppress(asyncio.CancelledError):
                await producer

    async def swap_weights(self, order: SwapOrder) -> SwapReport:
        if self.swap is not None and not self.swap.is_over:
            raise SwapRunningError("another swap has not ended")
        self.swap = SwapReport(order, self.model.weight_version, SwapPhase.LOADING)
        await asyncio.sleep(self.script.swap_s)
        if self.script.swap_error is not None:
            self.swap = replace(self.swap, phase=SwapPhase.FAILED, error=self.script.swap_error)
            raise SwapError(self.script.swap_error)
        version = version_of(order.path)
        self.swap = replace(self.swap, phase=SwapPhase.DONE, to_version=version)
        self.model = replace(self.model, weight_version=version)
        return self.swap

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=0,
            num_kv_blocks=100,
            num_kv_blocks_used=len(self.running),
            is_alive=self.script.is_alive,
            seconds_since_progress=99.0 if self.script.is_stalled else 0.0,
            is_stalled=self.script.is_stalled,
        )

    async def _produce(self, request: GenerationRequest, mailbox: Mailbox) -> None:
        try:
            await self._play(request, mailbox)
        except Exception as error:
            mailbox.fail(error)

    async def _play(self, request: GenerationRequest, mailbox: Mailbox) -> None:
        began = time.monotonic()
        await asyncio.sleep(self.script.first_delay_s)
        choices = [_Choice(request, index, self.model) for index in range(request.sampling.n)]
        running = list(choices)
        self.metrics.step(_step(num_prompt=len(request.prompt_token_ids), num_first=len(choices)))
        while running:
            for choice in running:
                if choice.num_tokens == self.script.fail_after:
                    mailbox.fail(GenerationFailedError("the engine failed"))
                    return
                mailbox.put(choice.step())
                if choice.finish_reason:
                    self.metrics.finished(
                        FinishRecord(
                            choice.finish_reason,
                            len(request.prompt_token_ids),
                            choice.num_tokens,
                            time.monotonic() - began,
                        )
                    )
            self.num_tokens_made += len(running)
            running = [choice for choice in running if not choice.finish_reason]
            if running:
                await asyncio.sleep(self.script.token_delay_s)


class _Choice:
    """One text as it grows by a byte a step."""

    def __init__(self, request: GenerationRequest, index: int, model: ModelInfo) -> None:
        self._weight_version = model.weight_version
        self._request = request
        self._index = index
        sampling = request.sampling
        room = model.max_model_len - len(request.prompt_token_ids)
        self._limit = room if sampling.max_tokens is None else sampling.max_tokens
        self._data = TEXT.encode()
        self._offset = 0 if sampling.is_greedy else 5 * ((sampling.seed or 0) + index)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def step(self) -> GenerationOutput:
        sampling, first = self._request.sampling, self.num_tokens == 0
        token_ids: tuple[int, ...] = ()
        text = ""
        if self._limit:
            token = self._data[(self._offset + self.num_tokens) % len(self._data)]
            token_ids = (token,)
            text = self._decoder.decode(bytes([token]))
            self.num_tokens += 1
        stop_reason = self._find_stop(sampling, text)
        if stop_reason is not None:
            self.finish_reason, text = "stop", ""
        elif self.num_tokens >= self._limit:
            self.finish_reason = "length"
            text += self._decoder.decode(b"", final=True)
        self._text += text
        prompt = self._request.prompt_token_ids
        return GenerationOutput(
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=None if sampling.logprobs is None else tuple(_logprobs(t, sampling.logprobs) for t in token_ids),
            finish_reason=self.finish_reason,  # type: ignore[arg-type]
            stop_reason=stop_reason,
            num_cached_tokens=len(prompt) // 2,
            prompt_logprobs=self._prompt_logprobs() if first and self._index == 0 else None,
            weight_version=self._weight_version,
        )

    def _find_stop(self, sampling: SamplingParams, text: str) -> str | int | None:
        """Only stop strings of one character are cut exactly: enough for a script."""
        return next((stop for stop in sampling.stop if (self._text + text).endswith(stop)), None)

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        count, prompt = self._request.sampling.prompt_logprobs, self._request.prompt_token_ids
        if count is None:
            return None
        return (None, *(_logprobs(token, count) for token in prompt[1:]))


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """The token itself is the likeliest but for one."""
    others = [Logprob((token + step) % 256, -1.0 - step) for step in range(1, count)]
    top = [Logprob((token + 128) % 256, -0.5), Logprob(token, -1.0), *others]
    return TokenLogprobs(Logprob(token, -1.0), tuple(top[:count]))


def _step(num_prompt: int, num_first: int) -> StepRecord:
    return StepRecord(
        duration_s=0.01,
        num_computed_tokens=num_prompt,
        num_prompt_tokens=num_prompt,
        num_generated_tokens=num_first,
        num_preemptions=0,
        inter_token_latencies_s=(),
        times_to_first_token_s=(0.01,) * num_first,
        queue_times_s=(0.0,) * num_first,
        prefix_cache_queries=num_prompt,
        prefix_cache_hits=num_prompt // 2,
    )
