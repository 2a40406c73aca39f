"""Stand-ins for what vLLM hands out, and for vLLM itself: each request gets the bytes of a text, one token a turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from apt_serve.engine.client import ModelInfo
from apt_serve.engine.output_processor import OutputProcessor
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.vllm.load import LoadedVllm
from tests.apt_serve.api.byte_tokenizer import EOS, ByteTokenizer

TEXT = b"Once upon a time there was a server. "


@dataclass
class Rank:
    logprob: float
    rank: int | None


@dataclass
class Completion:
    token_ids: list[int]
    logprobs: list[dict[int, Rank]] | None = None
    finish_reason: str | None = None


@dataclass
class Times:
    queued_ts: float = 1.0
    scheduled_ts: float = 1.5


@dataclass
class Output:
    outputs: list[Completion]
    prompt_logprobs: list[dict[int, Rank] | None] | None = None
    num_cached_tokens: int | None = 0
    metrics: Times | None = None


@dataclass
class FakeLlm:
    """As much of AsyncLLM as the engine uses."""

    errored: bool = False
    error: Exception | None = None
    """Raised by every request in place of its next token."""
    ends_with: str | None = None
    """Ends every request at its next token for this reason."""
    delay_s: float = 0.0
    running: set[str] = field(default_factory=set)
    num_shutdowns: int = 0
    output_handler: asyncio.Task[None] | None = None

    def shutdown(self, timeout: float) -> None:
        self.num_shutdowns += 1

    async def generate(self, seq: Sequence) -> AsyncGenerator[Output, None]:
        self.running.add(seq.seq_id)
        try:
            for number in range(max(seq.max_tokens, 1)):
                await asyncio.sleep(self.delay_s)
                if self.error is not None:
                    raise self.error
                reason = self.ends_with or ("length" if number + 1 >= seq.max_tokens else None)
                token = TEXT[(number + seq.index) % len(TEXT)]
                yield Output([Completion([token], finish_reason=reason)], num_cached_tokens=1, metrics=Times())
                if reason:
                    return
        finally:
            self.running.discard(seq.seq_id)


@dataclass(frozen=True)
class FakeVllm(LoadedVllm):
    """A loaded vLLM that is none."""

    def request(self, seq: Sequence) -> AsyncGenerator[Output, None]:  # type: ignore[override]
        return self.llm.generate(seq)


def fake_vllm(llm: FakeLlm, *, max_num_choices: int = 8) -> FakeVllm:
    tokenizer = ByteTokenizer()
    info = ModelInfo("m", 0, 64, max_num_choices, tokenizer.vocab_size, tokenizer, frozenset({EOS}), {})
    return FakeVllm(llm, info, OutputProcessor(tokenizer, info.eos_token_ids), num_kv_blocks=100, uses_priority=False)
