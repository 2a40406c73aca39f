"""/metrics: the names of the contract, and numbers that add up."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.engine.metrics import FinishRecord, StepRecord
from tests.apt_serve.api.conftest import ScriptedServer

NAMES = {
    "apt:time_to_first_token_seconds",
    "apt:inter_token_latency_seconds",
    "apt:request_queue_time_seconds",
    "apt:e2e_request_latency_seconds",
    "apt:engine_step_seconds",
    "apt:num_requests_running",
    "apt:num_requests_waiting",
    "apt:kv_cache_usage_perc",
    "apt:prompt_tokens",
    "apt:generation_tokens",
    "apt:computed_tokens",
    "apt:prefix_cache_queries",
    "apt:prefix_cache_hits",
    "apt:num_preemptions",
    "apt:request_success",
    "apt:requests_rejected",
}


def samples(http: httpx.Client) -> dict[str, float]:
    """Values by name and labels other than the model's."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            values[sample.name + "".join(f"|{v}" for v in labels.values())] = sample.value
    return values


def test_names_and_label(http: httpx.Client) -> None:
    families = list(text_string_to_metric_families(http.get("/metrics").text))
    assert {family.name for family in families} >= NAMES
    assert all("model_name" in sample.labels for family in families for sample in family.samples)


def test_rejections_are_counted_by_reason(scripted: ScriptedServer, http: httpx.Client) -> None:
    before = samples(http)
    http.post("/v1/completions", json={"prompt": "x", "model": "nope"})
    scripted.engine.script.is_overloaded = True
    for _ in range(2):
        http.post("/v1/completions", json={"prompt": "x"})
    http.get("/nope")
    after = samples(http)

    def grown(reason: str) -> float:
        name = f"apt:requests_rejected_total|{reason}"
        return after.get(name, 0) - before.get(name, 0)

    assert grown("model_not_found") == 1
    assert grown("engine_overloaded") == 2
    assert grown("not_found") == 0


def test_finished_choices_are_counted(scripted: ScriptedServer, http: httpx.Client) -> None:
    before = samples(http)
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 3, "n": 2}
    http.post("/v1/completions", json=body)
    after = samples(http)
    assert after["apt:request_success_total|length"] - before.get("apt:request_success_total|length", 0) == 2
    name = "apt:request_generation_tokens_sum"
    assert after[name] - before[name] == 6


def test_records_add_up() -> None:
    metrics = PrometheusMetrics("m")
    step = StepRecord(
        duration_s=0.5,
        num_prompt_tokens=10,
        num_computed_tokens=7,
        num_generated_tokens=2,
        num_preemptions=1,
        inter_token_latencies_s=(0.1, 0.2),
        times_to_first_token_s=(0.3,),
        queue_times_s=(0.0, 0.0, 0.0),
        prefix_cache_queries=10,
        prefix_cache_hits=4,
    )
    metrics.step(step)
    metrics.step(step)
    metrics.finished(FinishRecord("stop", 10, 5, 1.0))
    metrics.finished(FinishRecord("abort", 0, 6, 1.0))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"apt:{name}", {"model_name": "m", **labels})

    assert value("prompt_tokens_total") == 20
    assert value("computed_tokens_total") == 14
    assert value("generation_tokens_total") == 4
    assert value("num_preemptions_total") == 2
    assert value("prefix_cache_queries_total") == 20
    assert value("prefix_cache_hits_total") == 8
    assert value("inter_token_latency_seconds_count") == 4
    assert value("inter_token_latency_seconds_sum") == pytest.approx(0.6)
    assert value("time_to_first_token_seconds_count") == 2
    assert value("request_queue_time_seconds_count") == 6
    assert value("engine_step_seconds_sum") == 1.0
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("request_success_total", finished_reason="abort") == 1
    assert value("request_prompt_tokens_count") == 1
    assert value("request_generation_tokens_sum") == 11
