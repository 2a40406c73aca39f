"""What the engine reports of its work; the API turns it into Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from apt_serve.engine.client import FinishReason


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step."""

    duration_s: float
    num_prompt_tokens: int
    """Prompt tokens of the requests first scheduled in this step, each request counted once, cached tokens included."""
    num_computed_tokens: int
    """Tokens the model computed: chunks of prompts, generated tokens, and what a preemption made it compute again."""
    num_generated_tokens: int
    num_preemptions: int
    inter_token_latencies_s: tuple[float, ...]
    """For each sequence that got a token after its first: seconds since the one before."""
    times_to_first_token_s: tuple[float, ...]
    """For each sequence that got its first token: seconds since its request arrived."""
    queue_times_s: tuple[float, ...]
    """For each sequence first scheduled in this step: seconds it waited."""
    prefix_cache_queries: int
    """Prompt tokens looked up in the prefix cache in this step."""
    prefix_cache_hits: int
    """Of these, tokens found."""


@dataclass(frozen=True, slots=True)
class FinishRecord:
    """One finished choice."""

    reason: FinishReason
    num_prompt_tokens: int
    """0 for all but the first choice of a request, so that sums add up to the requests' usage."""
    num_generated_tokens: int
    e2e_latency_s: float


class MetricsSink(Protocol):
    """Receives records on the engine's thread; must be quick and must not raise."""

    def step(self, record: StepRecord) -> None:
        """A step has completed."""

    def finished(self, record: FinishRecord) -> None:
        """A choice has ended."""


class NullMetrics:
    """Forgets everything."""

    def step(self, record: StepRecord) -> None:
        """Ignore a step."""

    def finished(self, record: FinishRecord) -> None:
        """Ignore a finished choice."""
