"""Prometheus metrics: the engine's records as counters and histograms, its state as gauges read at each scrape."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from apt_serve.engine.client import EngineClient, EngineStats, EngineStoppedError
from apt_serve.engine.metrics import FinishRecord, StepRecord
from apt_serve.limits.limiter import Limiter
from apt_serve.telemetry.exchange import Exchange

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET", "GRPC"})


class PrometheusMetrics:
    """The engine's MetricsSink. One per server, with a registry of its own; safe to call from any thread."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _LONG_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "From one token to the next.", _LATENCY_BUCKETS)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", _LONG_BUCKETS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _LONG_BUCKETS)
        self._step = self._histogram("engine_step_seconds", "Duration of one engine step.", _LATENCY_BUCKETS)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._output_length = self._histogram(
            "request_generation_tokens", "Generated tokens of a choice.", _TOKEN_BUCKETS
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests, cached ones included.")
        self._computed_tokens = self._counter("computed_tokens", "Tokens the model computed, repeats included.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Sequences that had to give their memory back.")
        self._success = self._labelled("request_success", "Finished choices.", "finished_reason")
        self._swaps = self._labelled("weight_swaps", "Changes of weights, by how they ended.", "outcome")
        self._rejected = self._labelled("requests_rejected", "Requests answered with an error.", "reason")

        self._tenant_classes = {"default"}
        self._by_class = _ClassMetrics(self.registry)

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

    def rejected(self, reason: str) -> None:
        """Count one request that was answered with an error."""
        self._rejected.labels(self._model_name, reason).inc()

    def know_classes(self, names: Collection[str]) -> None:
        """Label by these tenant classes; callers of any other count as "other", so that labels stay bounded."""
        self._tenant_classes.update(names)

    def exchanged(self, exchange: Exchange) -> None:
        """Count a request, or a message on a WebSocket, that has ended."""
        tenant_class = exchange.caller.tenant_class if exchange.caller else "none"
        if exchange.caller and tenant_class not in self._tenant_classes:
            tenant_class = "other"
        self._by_class.count(exchange, self._model_name, tenant_class)

    def swapped(self, outcome: str) -> None:
        """Count one change of weights that has ended."""
        self._swaps.labels(self._model_name, outcome).inc()

    def watch(self, engine: EngineClient) -> None:
        """Read an engine's gauges at each scrape."""
        self.registry.register(_EngineGauges(engine, self._model_name))

    def watch_limits(self, limiter: Limiter) -> None:
        """Read at each scrape whether limits are counted together."""
        text = "1 while Redis fails and each replica applies the limits by itself."
        gauge = Gauge("apt:limits_fallback", text, ["model_name"], registry=self.registry)
        gauge.labels(self._model_name).set_function(lambda: limiter.is_fallback)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"apt:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
        return histogram.labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"apt:{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"apt:{name}", text, ["model_name", label], registry=self.registry)


class _ClassMetrics:
    """What callers see, by model and tenant class; the engine's own metrics know no classes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["model_name", "tenant_class"]

        def histogram(name: str, text: str, buckets: Sequence[float] = _LONG_BUCKETS) -> Histogram:
            return Histogram(f"apt:{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"apt:{name}", text, [*labels, *more], registry=registry)

        self._ttft = histogram("request_time_to_first_token_seconds", "HTTP arrival to first token.")
        self._framework = histogram(
            "time_to_first_token_framework_seconds", "Of that, and of the way to the socket, all but the engine's."
        )
        self._queue = histogram("queue_time_by_class_seconds", "Arrival at the engine to the first step.")
        self._per_token = histogram(
            "time_per_output_token_seconds", "First token to last, by the tokens between.", _LATENCY_BUCKETS
        )
        self._latency = histogram("request_latency_seconds", "HTTP arrival to the end of the answer.")
        self._prompt_tokens = counter("request_prompt_tokens_by_class", "Prompt tokens of requests.")
        self._generated_tokens = counter("request_generation_tokens_by_class", "Tokens generated for requests.")
        self._choices = counter("request_choices", "Choices by how they ended.", "finished_reason")
        self._http = counter("http_requests", "Requests answered.", "method", "route", "status")

    def count(self, exchange: Exchange, model_name: str, tenant_class: str) -> None:
        """Count an exchange that has ended."""
        labels = (model_name, tenant_class)
        method = exchange.method if exchange.method in _METHODS else "other"
        self._http.labels(*labels, method, exchange.route, str(exchange.status)).inc()
        if exchange.submitted_at is None:
            return
        if exchange.ended_at is not None:
            self._latency.labels(*labels).observe(exchange.ended_at - exchange.arrived_at)
        self._prompt_tokens.labels(*labels).inc(exchange.num_prompt_tokens)
        self._generated_tokens.labels(*labels).inc(exchange.num_generated_tokens)
        for reason, number in exchange.finish_reasons.items():
            self._choices.labels(*labels, reason).inc(number)
        if exchange.first_token_at is not None and exchange.last_token_at is not None:
            self._ttft.labels(*labels).observe(exchange.first_token_at - exchange.arrived_at)
            if exchange.num_generated_tokens > 1:
                seconds = exchange.last_token_at - exchange.first_token_at
                self._per_token.labels(*labels).observe(seconds / (exchange.num_generated_tokens - 1))
            framework_s = exchange.submitted_at - exchange.arrived_at
            if exchange.is_streamed and exchange.first_byte_at is not None:
                framework_s += exchange.first_byte_at - exchange.first_token_at
            self._framework.labels(*labels).observe(framework_s)
        if exchange.scheduled_at is not None:
            self._queue.labels(*labels).observe(exchange.scheduled_at - exchange.submitted_at)


class _EngineGauges(Collector):
    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        """Nothing: an engine that has not started has no numbers yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The engine's state at this moment."""
        stats = self._engine.stats()
        yield self._gauge("num_requests_running", "Sequences being computed.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences waiting for a place in a step.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1.", _kv_usage(stats))
        with suppress(EngineStoppedError):
            yield self._weight_version(self._engine.model.weight_version)

    def _weight_version(self, version: str) -> GaugeMetricFamily:
        text = "1 for the version of the weights that new requests start on."
        gauge = GaugeMetricFamily("apt:weight_version_info", text, labels=["model_name", "weight_version"])
        gauge.add_metric([self._model_name, version], 1)
        return gauge

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"apt:{name}", text, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge


def _kv_usage(stats: EngineStats) -> float:
    return stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0


def _observe_all(histogram: Histogram, values: Iterable[float]) -> None:
    for value in values:
        histogram.observe(value)


router = APIRouter(tags=["Operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    sink = request.app.state.api.metrics
    assert isinstance(sink, PrometheusMetrics)
    return Response(generate_latest(sink.registry), media_type=CONTENT_TYPE_LATEST)
