"""Generate in the terminal, with the engine in this process and no server."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from apt_serve.engine.client import EngineClient, GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.factory import make_engine
from apt_serve.engine.sampling_params import SamplingParams


def run(config: EngineConfig, prompt: str | Sequence[dict[str, Any]], sampling: Mapping[str, Any]) -> int:
    """Print the answer to a text or to chat messages as it is generated, and its speed on standard error.

    Raises:
        AptError: the model cannot be loaded, or the prompt cannot be served.
    """
    return asyncio.run(_run(make_engine(config), prompt, sampling))


async def _run(engine: EngineClient, prompt: str | Sequence[dict[str, Any]], sampling: Mapping[str, Any]) -> int:
    await engine.start()
    try:
        await _stream(engine, _request(engine, prompt, sampling))
    finally:
        await engine.stop()
    return 0


def _request(
    engine: EngineClient, prompt: str | Sequence[dict[str, Any]], sampling: Mapping[str, Any]
) -> GenerationRequest:
    tokenizer = engine.model.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        # The template writes special tokens, such as BOS, itself.
        ids = tokenizer.encode(tokenizer.apply_chat_template(prompt), add_special_tokens=False)
    defaults = engine.model.default_sampling
    return GenerationRequest("terminal", tuple(ids), SamplingParams(**{**defaults, **sampling}))


async def _stream(engine: EngineClient, request: GenerationRequest) -> None:
    began = time.perf_counter()
    first = began
    num_tokens = 0
    async for output in engine.generate(request):
        if num_tokens == 0:
            first = time.perf_counter()
        num_tokens += len(output.token_ids)
        print(output.text, end="", flush=True)
    rate = (num_tokens - 1) / max(time.perf_counter() - first, 1e-9)
    print()
    print(
        f"[{len(request.prompt_token_ids)} prompt tokens, first token after {first - began:.2f} s, "
        f"{num_tokens} tokens at {rate:.1f}/s]",
        file=sys.stderr,
    )
