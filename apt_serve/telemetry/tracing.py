"""OpenTelemetry traces. Imported, and the SDK with it, by a server that sends traces alone.

Spans are named after what the server knows of a request: ``admission`` (reading, access, limits), ``queue`` (until the
engine's first step for it), ``prefill`` and ``decode``. The caller's traceparent (W3C Trace Context) is continued.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from apt_serve.telemetry.config import TelemetryConfig
from apt_serve.telemetry.exchange import Exchange

_EXPORT_TIMEOUT_S = 5
_PARTS = ("admission", "queue", "prefill", "decode")
"""Of an exchange, one after the other."""


class Tracing:
    """Makes the spans of exchanges and sends them from a thread of its own.

    Args:
        config: with an endpoint.
    """

    def __init__(self, config: TelemetryConfig) -> None:
        exporter = OTLPSpanExporter(config.traces_endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(config.traces_sample_ratio),
            resource=Resource.create({"service.name": "apt-serve"}),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("apt_serve")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, exchange: Exchange, headers: Mapping[str, str]) -> Span:
        """Begin an exchange's span, below that which the caller's headers name."""
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return self._tracer.start_span(
            exchange.method,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=_unix_ns(exchange.arrived_at),
        )

    def traceparent(self, span: Span) -> str | None:
        """The header that names a span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent")

    def end(self, span: Span, exchange: Exchange) -> None:
        """End an exchange's span and say what happened in it."""
        ended_at = exchange.ended_at or time.monotonic()
        span.update_name(f"{exchange.method} {exchange.route}")
        span.set_attributes(_attributes(exchange))
        if exchange.status >= 500:
            span.set_status(StatusCode.ERROR)
        moments = [
            exchange.arrived_at,
            exchange.submitted_at,
            exchange.scheduled_at,
            exchange.first_token_at,
            ended_at,
        ]
        context = set_span_in_context(span)
        for name, begin, end in zip(_PARTS, moments, moments[1:], strict=False):
            if begin is not None and exchange.submitted_at is not None:
                child = self._tracer.start_span(name, context=context, start_time=_unix_ns(begin))
                child.end(_unix_ns(ended_at if end is None else end))
        span.end(_unix_ns(ended_at))

    def close(self) -> None:
        """Send what has not been sent. Blocks for as long as that takes, a few seconds at most."""
        self._provider.shutdown()


def _attributes(exchange: Exchange) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "http.request.method": exchange.method,
        "http.route": exchange.route,
        "http.response.status_code": exchange.status,
        "apt.request_id": exchange.request_id,
    }
    if exchange.caller is not None:
        attributes["apt.tenant_class"] = exchange.caller.tenant_class
    if exchange.model is not None:
        attributes["gen_ai.request.model"] = exchange.model
        attributes["gen_ai.usage.input_tokens"] = exchange.num_prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = exchange.num_generated_tokens
    return attributes


def _unix_ns(moment: float) -> int:
    """A moment of ``time.monotonic()`` as Unix time in nanoseconds."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
