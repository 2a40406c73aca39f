"""What engines report, as counters and histograms by model, and their state as gauges read at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from apt_serve.engine.client import EngineClient, EngineStats, EngineStoppedError
from apt_serve.engine.metrics import FinishRecord, StepRecord

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LONG_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class EngineMetrics:
    """The collectors that all engines of a server share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"apt:{name}", text, ["model_name"], buckets=buckets, registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"apt:{name}", text, ["model_name", *more], registry=registry)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", LONG_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "From one token to the next.", LATENCY_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first step.", LONG_BUCKETS)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", LONG_BUCKETS)
        self.step = histogram("engine_step_seconds", "Duration of one engine step.", LATENCY_BUCKETS)
        self.prompt_length = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self.output_length = histogram("request_generation_tokens", "Generated tokens of a choice.", TOKEN_BUCKETS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests, cached ones included.")
        self.computed_tokens = counter("computed_tokens", "Tokens the model computed, repeats included.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = counter("num_preemptions", "Sequences that had to give their memory back.")
        self.success = counter("request_success", "Finished choices.", "finished_reason")


class EngineSink:
    """The MetricsSink of one engine; safe to call from any thread."""

    def __init__(self, metrics: EngineMetrics, model_name: str) -> None:
        self._model_name = model_name
        self._ttft = metrics.ttft.labels(model_name)
        self._itl = metrics.itl.labels(model_name)
        self._queue = metrics.queue.labels(model_name)
        self._e2e = metrics.e2e.labels(model_name)
        self._step = metrics.step.labels(model_name)
        self._prompt_length = metrics.prompt_length.labels(model_name)
        self._output_length = metrics.output_length.labels(model_name)
        self._prompt_tokens = metrics.prompt_tokens.labels(model_name)
        self._computed_tokens = metrics.computed_tokens.labels(model_name)
        self._generation_tokens = metrics.generation_tokens.labels(model_name)
        self._cache_queries = metrics.cache_queries.labels(model_name)
        self._cache_hits = metrics.cache_hits.labels(model_name)
        self._preemptions = metrics.preemptions.labels(model_name)
        self._success = metrics.success

    def step(self, record: StepRecord) -> None:
        """Count one engine step."""
        self._step.observe(record.duration_s)
        _observe_all(self._ttft, record.times_to_first_token_s)
        _observe_all(self._itl, record.inter_token_latencies_s)
        _observe_all(self._queue, record.queue_times_s)
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._computed_tokens.inc(record.num_computed_tokens)
        self._generation_tokens.inc(record.num_generated_tokens)
        self._cache_queries.inc(record.prefix_cache_queries)
        self._cache_hits.inc(record.prefix_cache_hits)
        self._preemptions.inc(record.num_preemptions)

    def finished(self, record: FinishRecord) -> None:
        """Count one finished choice."""
        self._success.labels(self._model_name, record.reason).inc()
        self._e2e.observe(record.e2e_latency_s)
        if record.num_prompt_tokens:  # 0 for all but the first choice of a request
            self._prompt_length.observe(record.num_prompt_tokens)
        self._output_length.observe(record.num_generated_tokens)


class EngineGauges(Collector):
    """The state of engines at this moment; one that is gone has none."""

    def __init__(self) -> None:
        self._engines: dict[str, EngineClient] = {}

    def watch(self, model_name: str, engine: EngineClient) -> None:
        """Read an engine from now on."""
        self._engines[model_name] = engine

    def forget(self, model_name: str) -> None:
        """The end of ``watch``."""
        self._engines.pop(model_name, None)

    def describe(self) -> Iterable[Metric]:
        """Nothing: an engine that has not started has no numbers yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The engines' state at this moment."""
        running = _gauge("num_requests_running", "Sequences being computed.")
        waiting = _gauge("num_requests_waiting", "Sequences waiting for a place in a step.")
        usage = _gauge("kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1.")
        version_text = "1 for the version of the weights that new requests start on."
        version = _gauge("weight_version_info", version_text, "weight_version")
        for name, engine in self._engines.copy().items():
            stats = engine.stats()
            running.add_metric([name], stats.num_running)
            waiting.add_metric([name], stats.num_waiting)
            usage.add_metric([name], _kv_usage(stats))
            with suppress(EngineStoppedError):
                version.add_metric([name, engine.model.weight_version], 1)
        return [running, waiting, usage, version]


def _gauge(name: str, text: str, *more: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"apt:{name}", text, labels=["model_name", *more])


def _kv_usage(stats: EngineStats) -> float:
    return stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0


def _observe_all(histogram: Histogram, values: Iterable[float]) -> None:
    for value in values:
        histogram.observe(value)
