"""Where a request's deltas wait for their reader, merged so that a slow reader holds at most one per choice."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from apt_core.manifest import UNPUBLISHED
from apt_serve.engine.client import GenerationOutput


class Mailbox:
    """Deltas of one request's choices between the engine's thread and their reader. Used on the event loop only."""

    def __init__(self, num_choices: int, weight_version: str = UNPUBLISHED, tenant: str = "") -> None:
        self.weight_version = weight_version
        """Of all choices."""
        self.tenant = tenant
        self._num_unfinished = num_choices
        self._pending: dict[int, GenerationOutput] = {}
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, output: GenerationOutput) -> None:
        """Add a delta."""
        held = self._pending.get(output.index)
        self._pending[output.index] = output if held is None else _merge(held, output)
        self._num_unfinished -= output.finish_reason is not None
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """End all choices; the reader gets the error after the deltas that are here."""
        self._error = error
        self._arrived.set()

    async def take(self) -> list[GenerationOutput]:
        """All that is here, waiting if there is nothing; empty once every choice has finished and was taken.

        Raises:
            Exception: the error given to ``fail``.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._num_unfinished == 0:
                return []
            self._arrived.clear()
            await self._arrived.wait()
        outputs = list(self._pending.values())
        self._pending.clear()
        return outputs


def _merge(first: GenerationOutput, second: GenerationOutput) -> GenerationOutput:
    has_logprobs = first.logprobs is not None or second.logprobs is not None
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=(*(first.logprobs or ()), *(second.logprobs or ())) if has_logprobs else None,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )
