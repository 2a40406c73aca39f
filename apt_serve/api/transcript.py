"""What accumulates while a job runs: token counts and the text so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apt_serve.api.generation import ChoiceDelta, Job
from apt_serve.api.schemas.common import PromptTokensDetails, Usage
from apt_serve.usage.records import Usage as UsedTokens


class Tally:
    """Counts a job's tokens as they come."""

    def __init__(self, job: Job) -> None:
        self.num_prompt_tokens = job.num_prompt_tokens
        self.num_completion_tokens = 0
        self._num_unfinished = job.n * len(job.prompts)
        self._cached: dict[int, int] = {}

    def add(self, batch: Sequence[ChoiceDelta]) -> None:
        """Count what is new."""
        for delta in batch:
            self.num_completion_tokens += len(delta.output.token_ids)
            self._num_unfinished -= delta.output.finish_reason is not None
            if delta.output.index == 0:  # the other choices find their prompt in the cache by way of this one
                self._cached[delta.prompt] = delta.output.num_cached_tokens

    def usage(self) -> Usage:
        """The counts so far, on the wire."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            total_tokens=self.num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
        )

    def used(self) -> UsedTokens:
        """The counts so far, for the records."""
        return UsedTokens(1, self.num_prompt_tokens, self.num_cached_tokens, self.num_completion_tokens)

    @property
    def num_tokens(self) -> int:
        """Of prompts and answers, so far."""
        return self.num_prompt_tokens + self.num_completion_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts, found in the prefix cache."""
        return sum(self._cached.values())

    @property
    def is_complete(self) -> bool:
        """Whether every choice has finished."""
        return self._num_unfinished == 0


class Transcript:
    """All deltas of each choice, joined: a whole answer is one large delta."""

    def __init__(self) -> None:
        self._parts: dict[int, list[ChoiceDelta]] = {}

    def add(self, batch: Sequence[ChoiceDelta]) -> None:
        """Keep what is new."""
        for delta in batch:
            self._parts.setdefault(delta.choice, []).append(delta)

    def choices(self) -> list[ChoiceDelta]:
        """One delta per choice, in the order of their numbers."""
        return [_join(self._parts[number]) for number in sorted(self._parts)]


def _join(parts: Sequence[ChoiceDelta]) -> ChoiceDelta:
    outputs = [part.output for part in parts]
    logprobs = None
    if any(output.logprobs is not None for output in outputs):
        logprobs = tuple(entry for output in outputs for entry in output.logprobs or ())
    whole = replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=logprobs,
        prompt_logprobs=next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), None),
    )
    return replace(parts[0], output=whole)
