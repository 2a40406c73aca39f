"""What vLLM does, step by step, as APT reports it: a logger of vLLM's statistics that feeds a MetricsSink."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from apt_serve.engine.client import FinishReason
from apt_serve.engine.metrics import MetricsSink, StepRecord
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step_recorder import finish_record
from apt_serve.engine.token_clock import TokenClock

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class VllmRecorder:
    """Remembers the latest state of vLLM's schedulers and reports each step. Used on the event loop only.

    What happens before the first request is vLLM's own business, and not reported.
    Times to the first token and between tokens are those at which deltas arrive here, which is what a client sees.
    """

    def __init__(self, sink: MetricsSink) -> None:
        self.progress_at = time.monotonic()
        """When the last step completed, or work began again."""
        self._has_begun = False
        self._sink = sink
        self._clock = TokenClock()
        self._schedulers: dict[int, SchedulerStats] = {}
        """The latest of each engine; there are several under data parallelism."""
        self._num_prompt_tokens = 0
        self._queue_times_s: list[float] = []

    @property
    def num_running(self) -> int:
        """Sequences in vLLM's batches after the last step."""
        return sum(stats.num_running_reqs for stats in self._schedulers.values())

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV-cache blocks in use after the last step, 0 to 1."""
        usages = [float(stats.kv_cache_usage) for stats in self._schedulers.values()]
        return sum(usages) / max(len(usages), 1)

    def begin_work(self) -> None:
        """The first request after a time without any has come."""
        self._has_begun = True
        self.progress_at = time.monotonic()

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """A delta has come for a sequence; ``seq`` does not contain its tokens yet."""
        if seq.num_output_tokens == 0:
            self._num_prompt_tokens += seq.num_prompt_tokens if seq.index == 0 else 0
            self._queue_times_s.append(seq.queue_s)
        self._clock.advance(seq, num_tokens)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """A sequence ended."""
        self._clock.forget(seq)
        self._sink.finished(finish_record(seq, reason))

    # The rest is called by vLLM, as its StatLoggerBase defines it; inheriting it would take an import at the top.

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        """A step's outputs have been handed to their readers, who will have read them when this loop's turn is over."""
        if not self._has_begun:
            return
        now = time.monotonic()
        duration_s, self.progress_at = now - self.progress_at, now
        if scheduler_stats is not None:
            self._schedulers[engine_idx] = scheduler_stats
        asyncio.get_running_loop().call_soon(self._report, duration_s, scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing: the engine says so itself."""

    def log(self) -> None:
        """Nothing: the metrics are scraped."""

    def record_sleep_state(self, *_: Any) -> None:
        """Nothing: APT never puts the engine to sleep."""

    def _report(self, duration_s: float, scheduler: SchedulerStats | None, iteration: IterationStats | None) -> None:
        times = self._clock.take()
        prefix_cache = scheduler and scheduler.prefix_cache_stats
        self._sink.step(
            StepRecord(
                duration_s=duration_s,
                num_prompt_tokens=self._num_prompt_tokens,
                num_computed_tokens=_num_computed(iteration) if iteration else 0,
                num_generated_tokens=times.num_generated,
                num_preemptions=iteration.num_preempted_reqs if iteration else 0,
                inter_token_latencies_s=tuple(times.token_gaps_s),
                times_to_first_token_s=tuple(times.first_token_waits_s),
                queue_times_s=tuple(self._queue_times_s),
                prefix_cache_queries=prefix_cache.queries if prefix_cache else 0,
                prefix_cache_hits=prefix_cache.hits if prefix_cache else 0,
            )
        )
        self._num_prompt_tokens, self._queue_times_s = 0, []


def _num_computed(iteration: IterationStats) -> int:
    """Tokens that went through the model: a sequence's first token came out of its prompt's last."""
    num_decoded = iteration.num_generation_tokens - len(iteration.time_to_first_tokens_iter)
    return int(iteration.prompt_token_stats.computed + num_decoded)
