"""Prometheus metrics of one server: its engines', its requests' and its further models', in one registry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from apt_serve.api.engine_metrics import LATENCY_BUCKETS, LONG_BUCKETS, EngineGauges, EngineMetrics, EngineSink
from apt_serve.api.job_metrics import JobGauges
from apt_serve.api.model_metrics import ModelMetrics
from apt_serve.engine.client import EngineClient
from apt_serve.engine.metrics import FinishRecord, StepRecord
from apt_serve.jobs.service import JobService
from apt_serve.limits.limiter import Limiter
from apt_serve.telemetry.exchange import Exchange

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET", "GRPC"})


class PrometheusMetrics:
    """The default engine's MetricsSink. One per server, with a registry of its own; safe to call from any thread."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._engines = EngineMetrics(self.registry)
        self._default = self.sink(model_name)
        self._gauges = EngineGauges()
        self.registry.register(self._gauges)
        self._swaps = self._labelled("weight_swaps", "Changes of weights, by how they ended.", "outcome")
        self._rejected = self._labelled("requests_rejected", "Requests answered with an error.", "reason")

        self._tenant_classes = {"default"}
        self._by_class = _ClassMetrics(self.registry)

    def step(self, record: StepRecord) -> None:
        """Count one engine step."""
        self._default.step(record)

    def finished(self, record: FinishRecord) -> None:
        """Count one finished choice."""
        self._default.finished(record)

    def sink(self, model_name: str) -> EngineSink:
        """The MetricsSink of another model's engine."""
        return EngineSink(self._engines, model_name)

    def rejected(self, reason: str, model_name: str | None = None) -> None:
        """Count one request that was answered with an error.

        Args:
            model_name: of the model that it was for, if that is one of the served; None: the default.
        """
        self._rejected.labels(model_name or self._model_name, reason).inc()

    def know_classes(self, names: Collection[str]) -> None:
        """Label by these tenant classes; callers of any other count as "other", so that labels stay bounded."""
        self._tenant_classes.update(names)

    def exchanged(self, exchange: Exchange) -> None:
        """Count a request, or a message on a WebSocket, that has ended."""
        tenant_class = exchange.caller.tenant_class if exchange.caller else "none"
        if exchange.caller and tenant_class not in self._tenant_classes:
            tenant_class = "other"
        self._by_class.count(exchange, exchange.model or self._model_name, tenant_class)

    def swapped(self, outcome: str) -> None:
        """Count one change of weights that has ended."""
        self._swaps.labels(self._model_name, outcome).inc()

    def watch(self, engine: EngineClient) -> None:
        """Read the default model's gauges at each scrape."""
        self._gauges.watch(self._model_name, engine)

    def watch_models(self, names: Iterable[str]) -> ModelMetrics:
        """What is to be told of loads and evictions of further models."""
        metrics = ModelMetrics(self.registry, self._gauges)
        for name in names:
            metrics.know(name)
        return metrics

    def watch_limits(self, limiter: Limiter) -> None:
        """Read at each scrape whether limits are counted together."""
        text = "1 while Redis fails and each replica applies the limits by itself."
        gauge = Gauge("apt:limits_fallback", text, ["model_name"], registry=self.registry)
        gauge.labels(self._model_name).set_function(lambda: limiter.is_fallback)

    def watch_jobs(self, jobs: JobService) -> None:
        """Read at each scrape what was counted of batches and jobs."""
        self.registry.register(JobGauges(self._model_name, lambda: jobs.census))

    def _labelled(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"apt:{name}", text, ["model_name", label], registry=self.registry)


class _ClassMetrics:
    """What callers see, by model and tenant class; the engine's own metrics know no classes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["model_name", "tenant_class"]

        def histogram(name: str, text: str, buckets: Sequence[float] = LONG_BUCKETS) -> Histogram:
            return Histogram(f"apt:{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"apt:{name}", text, [*labels, *more], registry=registry)

        self._ttft = histogram("request_time_to_first_token_seconds", "HTTP arrival to first token.")
        self._framework = histogram(
            "time_to_first_token_framework_seconds", "Of that, and of the way to the socket, all but the engine's."
        )
        self._queue = histogram("queue_time_by_class_seconds", "Arrival at the engine to the first step.")
        self._per_token = histogram(
            "time_per_output_token_seconds", "First token to last, by the tokens between.", LATENCY_BUCKETS
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


router = APIRouter(tags=["Operations"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    sink = request.app.state.api.metrics
    assert isinstance(sink, PrometheusMetrics)
    return Response(generate_latest(sink.registry), media_type=CONTENT_TYPE_LATEST)
