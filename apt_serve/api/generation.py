"""From one HTTP request to engine requests, and from their deltas to one merged stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass

from apt_core.errors import InvalidRequestError
from apt_serve.api.errors import RequestTimeoutError, wire_names
from apt_serve.engine.client import (
    Capability,
    EngineClient,
    EngineStoppedError,
    GenerationFailedError,
    GenerationOutput,
    GenerationRequest,
)
from apt_serve.engine.sampling_params import SamplingParams

_MAX_DELTAS_AHEAD = 16
"""Deltas taken from the engine before the writer wants them; beyond it they merge in the engine's mailboxes."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: tuple[int, ...]
    text: str | None
    """As the client wrote it; None where it sent token ids."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a job comes from, as far as the engine is to know."""

    tenant: str
    """Whom its tokens are counted for."""
    cache_salt: str
    """Prefixes are shared among jobs with the same one alone."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything one HTTP request asks of the engine. Choice numbers run over prompts times n."""

    id: str
    created: int
    model: str
    prompts: tuple[Prompt, ...]
    requests: tuple[GenerationRequest, ...]
    """One per prompt."""
    n: int

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new of one choice of a job."""

    prompt: int
    """Which of the job's prompts."""
    choice: int
    """Which of the job's choices: prompt * n + output.index."""
    output: GenerationOutput


def make_job(
    engine: EngineClient,
    kind: str,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    origin: Origin,
    priority: int | None = None,
    names: Mapping[str, str] | None = None,
) -> Job:
    """Validate all prompts before any starts.

    Args:
        engine: who will serve it.
        kind: prefix of the answer's id.
        prompts: at least one.
        sampling: the same for all prompts.
        origin: from ``ApiState.origin``.
        priority: lower is served earlier; None if the client does not care.
        names: what the client calls a field that the engine complains of.

    Raises:
        InvalidRequestError: the engine could never serve it.
    """
    job_id = f"{kind}-{uuid.uuid4().hex}"
    weight_version = engine.model.weight_version  # of all prompts the same
    requests = tuple(
        GenerationRequest(
            f"{job_id}-{number}",
            prompt.token_ids,
            sampling,
            priority or 0,
            origin.tenant,
            origin.cache_salt,
            weight_version,
        )
        for number, prompt in enumerate(prompts)
    )
    with wire_names(names or {}):
        _require_capabilities(engine, sampling, priority)
        for request in requests:
            engine.check(request)
    return Job(job_id, int(time.time()), engine.model.name, tuple(prompts), requests, sampling.n)


def _require_capabilities(engine: EngineClient, sampling: SamplingParams, priority: int | None) -> None:
    wanted = {
        Capability.LOGPROBS: sampling.logprobs is not None,
        Capability.PROMPT_LOGPROBS: sampling.prompt_logprobs is not None,
        Capability.PRIORITY: bool(priority),
    }
    for capability, is_wanted in wanted.items():
        if is_wanted and capability not in engine.capabilities:
            message = f"The engine behind {engine.model.name!r} does not support {capability.value}."
            raise InvalidRequestError(message, param=capability.value, code="unsupported_parameter")


Batches = AsyncGenerator[list[ChoiceDelta], None]
"""Deltas of a job, everything that is there at a time."""
Guard = Callable[[], AbstractAsyncContextManager[None]]
"""Made around each prompt's generation; may end it with an error."""


async def run_job(engine: EngineClient, job: Job, timeout_s: float, guard: Guard = nullcontext) -> Batches:
    """Deltas of all choices as they come, everything that is there at a time. Closing it aborts what still runs.

    Raises:
        RequestTimeoutError: the job did not finish in time.
        Exception: the guard's.
        AptError: as ``EngineClient.generate``.
    """
    arrivals: asyncio.Queue[ChoiceDelta | _Ended] = asyncio.Queue(_MAX_DELTAS_AHEAD)
    running = len(job.requests)
    pumps = [asyncio.create_task(_pump(engine, job, number, timeout_s, guard, arrivals)) for number in range(running)]
    try:
        while running:
            batch: list[ChoiceDelta] = []
            for item in await _take_all(arrivals):
                if isinstance(item, ChoiceDelta):
                    batch.append(item)
                elif item.error is not None:
                    raise item.error
                else:
                    running -= 1
            if batch:
                yield batch
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A prompt's generation is over."""

    error: Exception | None = None


async def _pump(
    engine: EngineClient,
    job: Job,
    number: int,
    timeout_s: float,
    guard: Guard,
    arrivals: asyncio.Queue[ChoiceDelta | _Ended],
) -> None:
    """Carry the deltas of one prompt into the common queue, and how they ended."""
    try:
        async with asyncio.timeout(timeout_s), guard(), aclosing(engine.generate(job.requests[number])) as outputs:
            async for output in outputs:
                _refuse_failure(output)
                await arrivals.put(ChoiceDelta(number, number * job.n + output.index, output))
        ended = _Ended()
    except TimeoutError:
        ended = _Ended(RequestTimeoutError(timeout_s))
    except Exception as error:
        ended = _Ended(error)
    await arrivals.put(ended)


def _refuse_failure(output: GenerationOutput) -> None:
    """A choice that the engine gave up is no answer."""
    if output.finish_reason == "abort":
        raise EngineStoppedError("The server stopped before the answer was complete.")
    if output.finish_reason == "error":
        raise GenerationFailedError("The engine failed before the answer was complete.")


async def _take_all(arrivals: asyncio.Queue[ChoiceDelta | _Ended]) -> list[ChoiceDelta | _Ended]:
    items = [await arrivals.get()]
    while not arrivals.empty():
        items.append(arrivals.get_nowait())
    return items
