"""Times what happens to sequences and reports it, step by step, to a MetricsSink."""

from __future__ import annotations

import time

from apt_serve.engine.client import FinishReason
from apt_serve.engine.metrics import FinishRecord, MetricsSink, StepRecord
from apt_serve.engine.scheduler import Scheduler
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import StepInput
from apt_serve.engine.token_clock import TokenClock


class StepRecorder:
    """Collects the events of one step, then reports them at once."""

    def __init__(self, sink: MetricsSink, scheduler: Scheduler) -> None:
        self._sink = sink
        self._scheduler = scheduler
        self._clock = TokenClock()
        self._recorded_at = 0.0
        self._num_preemptions = 0
        self._cache_queries = 0
        self._cache_hits = 0

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """A sequence got so many new tokens in this step."""
        self._clock.advance(seq, num_tokens)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """A sequence ended."""
        self._clock.forget(seq)
        self._sink.finished(finish_record(seq, reason))

    def record(self, step: StepInput, launched_at: float, newcomers: list[Sequence]) -> None:
        """Report a step that has just been taken in.

        Args:
            launched_at: time.monotonic(). A step that was launched while another ran is counted from the other's end.
            newcomers: sequences that the step scheduled for the first time.
        """
        scheduler, now = self._scheduler, time.monotonic()
        times = self._clock.take()
        self._sink.step(
            StepRecord(
                duration_s=now - max(launched_at, self._recorded_at),
                num_prompt_tokens=sum(seq.num_prompt_tokens for seq in newcomers if seq.index == 0),
                num_computed_tokens=step.num_tokens,
                num_generated_tokens=times.num_generated,
                num_preemptions=scheduler.num_preemptions - self._num_preemptions,
                inter_token_latencies_s=tuple(times.token_gaps_s),
                times_to_first_token_s=tuple(times.first_token_waits_s),
                queue_times_s=tuple(seq.queue_s for seq in newcomers),
                prefix_cache_queries=scheduler.num_prefix_cache_queries - self._cache_queries,
                prefix_cache_hits=scheduler.num_prefix_cache_hits - self._cache_hits,
            )
        )
        self._recorded_at = now
        self._num_preemptions = scheduler.num_preemptions
        self._cache_queries, self._cache_hits = scheduler.num_prefix_cache_queries, scheduler.num_prefix_cache_hits


def finish_record(seq: Sequence, reason: FinishReason) -> FinishRecord:
    """The record of a sequence that has just ended."""
    return FinishRecord(
        reason=reason,
        num_prompt_tokens=seq.num_prompt_tokens if seq.index == 0 else 0,
        num_generated_tokens=seq.num_output_tokens,
        e2e_latency_s=time.monotonic() - seq.arrival_time,
    )
