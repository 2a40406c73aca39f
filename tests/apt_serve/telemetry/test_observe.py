"""What is said of requests: metrics by tenant class, access log, traces; and what is never said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from apt_serve.access.identity import Identity, Scope
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.records.config import RecordsConfig
from apt_serve.telemetry.config import TelemetryConfig
from apt_serve.telemetry.exchange import Exchange
from tests.apt_serve.api.conftest import CONFIG
from tests.apt_serve.api.live_server import LiveServer
from tests.apt_serve.api.scripted_engine import ScriptedEngine
from tests.apt_serve.telemetry.collector import Collector

SECRET = "a-secret-that-nobody-may-log"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def server(folder: Path, telemetry: TelemetryConfig) -> tuple[LiveServer, PrometheusMetrics]:
    config = replace(CONFIG, records=RecordsConfig(folder=str(folder)), telemetry=telemetry)
    prometheus = PrometheusMetrics("scripted")
    return LiveServer(create_app(config, ScriptedEngine(prometheus), prometheus)), prometheus


def test_traces_continue_the_callers_and_hold_no_prompt(tmp_path: Path, collector: Collector) -> None:
    live, _ = server(tmp_path, TelemetryConfig(traces_endpoint=collector.url))
    with live:
        body = {"prompt": SECRET, "max_tokens": 3}
        answer = httpx.post(f"{live.base_url}/v1/completions", json=body, headers={"traceparent": PARENT})
        text = answer.json()["choices"][0]["text"]
        with connect(live.base_url.replace("http", "ws", 1) + "/ws/generate") as socket:
            socket.send(json.dumps({"type": "generate", "id": "1", "prompt": SECRET, "max_tokens": 2}))
            while json.loads(socket.recv(timeout=30))["type"] != "finish":
                pass
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == PARENT.split("-")[1]}
    assert set(spans) == {"POST /v1/completions", "admission", "queue", "prefill", "decode"}
    root = spans.pop("POST /v1/completions")
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    assert answer.headers["traceparent"].split("-")[1:3] == [root.trace_id.hex(), root.span_id.hex()]
    assert all(span.parent_span_id == root.span_id for span in spans.values())
    order = [root.start_time_unix_nano]
    for name in ("admission", "queue", "prefill", "decode"):
        order += [spans[name].start_time_unix_nano, spans[name].end_time_unix_nano]
    assert all(a <= b + 1_000_000 for a, b in pairwise(order))
    attributes = {a.key: a.value for a in root.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == 3
    assert attributes["apt.request_id"].string_value == answer.headers["x-request-id"]
    assert any(span.name == "MESSAGE /ws/generate" for span in collector.spans)
    assert SECRET.encode() not in collector.raw
    assert text.encode() not in collector.raw


def test_the_access_log_has_a_line_per_request_and_no_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live, _ = server(tmp_path, TelemetryConfig(access_log=True))
    with live:
        httpx.post(
            f"{live.base_url}/v1/completions?q={SECRET}",
            json={"prompt": SECRET, "max_tokens": 4},
            headers={"Authorization": f"Bearer {SECRET}", "X-Request-ID": "mine"},
        )
        httpx.get(f"{live.base_url}/nope/{SECRET}")
    out = capsys.readouterr().out
    done, missing = (json.loads(line) for line in out.splitlines())
    assert SECRET not in out
    assert (done["request_id"], done["route"], done["status"]) == ("mine", "/v1/completions", 200)
    assert (done["owner"], done["model"], done["completion_tokens"]) == ("local", "scripted", 4)
    assert 0 < done["time_to_first_token_s"] <= done["duration_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", done["time"])
    assert (missing["route"], missing["status"], missing["model"]) == ("unmatched", 404, None)


def test_nothing_is_written_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live, _ = server(tmp_path, TelemetryConfig())
    with live:
        answer = httpx.post(f"{live.base_url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert "traceparent" not in answer.headers
    assert capsys.readouterr().out == ""


def test_requests_are_counted_once_and_by_class(tmp_path: Path) -> None:
    live, prometheus = server(tmp_path, TelemetryConfig())
    with live:
        httpx.post(f"{live.base_url}/v1/completions", json={"prompt": "abc", "max_tokens": 5, "n": 2})
        httpx.post(f"{live.base_url}/v1/completions", json={"prompt": "abc", "max_tokens": 5, "stream": True})
    labels = {"model_name": "scripted", "tenant_class": "default"}

    def value(name: str, **more: str) -> float | None:
        return prometheus.registry.get_sample_value(f"apt:{name}", labels | more)

    assert value("http_requests_total", method="POST", route="/v1/completions", status="200") == 2
    assert value("request_generation_tokens_by_class_total") == 15
    assert value("request_choices_total", finished_reason="length") == 3
    assert value("request_time_to_first_token_seconds_count") == 2
    assert value("queue_time_by_class_seconds_count") == value("time_per_output_token_seconds_count") == 2
    total, framework = (value(f"{name}_seconds_sum") for name in ("request_latency", "time_to_first_token_framework"))
    assert total is not None and framework is not None and 0 < framework < total


def test_classes_that_are_not_configured_share_a_label() -> None:
    metrics = PrometheusMetrics("m")
    metrics.know_classes(["gold"])
    for name in ("gold", "unheard-of", "another"):
        caller = Identity("o", frozenset({Scope.INFERENCE}), tenant_class=name)
        metrics.exchanged(Exchange("id", "GET", status=200, caller=caller))

    def count(tenant_class: str) -> float | None:
        labels = {"model_name": "m", "tenant_class": tenant_class, "method": "GET", "route": "unmatched"}
        return metrics.registry.get_sample_value("apt:http_requests_total", labels | {"status": "200"})

    assert (count("gold"), count("other"), count("unheard-of")) == (1, 2, None)
