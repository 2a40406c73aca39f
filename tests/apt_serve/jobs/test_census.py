"""The metrics of batches and jobs."""

from __future__ import annotations

import time
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from apt_serve.jobs.census import Census, take_census
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.records import Kind, State
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database
from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.jobs.conftest import Jobs


async def test_jobs_are_counted_by_kind_and_state(records: RecordsConfig) -> None:
    database = Database(records)
    store = JobStore(database, 60.0)

    async def create(kind: Kind, **columns: Any) -> str:
        identity = {"models": None, "tenant_class": "default"}
        fixed = {"endpoint": "/v1/completions", "completion_window": "10m", "identity": identity, "owner": "alice"}
        return (await store.create(kind, max_unfinished=9, window_s=600, **fixed, **columns)).id

    assert await take_census(database) == Census({}, {}, 0)
    began = time.time()
    await create(Kind.BATCH)
    second = time.time()
    await create(Kind.BATCH)
    claim = await store.claim(await create(Kind.JOB, webhook_url="https://example.com/"))
    assert claim is not None
    census = await take_census(database)
    assert census.counts == {("batch", "validating"): 2, ("job", "validating"): 1}
    assert census.waiting_since.keys() == {"batch"}
    assert began <= census.waiting_since["batch"] <= second
    await store.finish(claim, State.FAILED)
    census = await take_census(database)
    assert census.counts == {("batch", "validating"): 2, ("job", "failed"): 1}
    assert census.num_webhooks_due == 1
    await database.close()


def gauges(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """Of jobs, by their labels."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    wanted = [sample for sample in samples if sample.name in ("apt:jobs", "apt:jobs_oldest_waiting_seconds")]
    assert all(sample.labels.pop("model_name") == "scripted" for sample in wanted)
    return {(sample.name, *sample.labels.values()): sample.value for sample in wanted}


def test_a_scrape_tells_of_them(jobs: Jobs) -> None:
    before = gauges(jobs.http).get(("apt:jobs", "job", "completed"), 0.0)
    body = {"endpoint": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1}}
    assert jobs.http.post("/v1/jobs", json=body).status_code == 202
    wait_until(lambda: gauges(jobs.http).get(("apt:jobs", "job", "completed"), 0.0) > before)
    assert gauges(jobs.http)["apt:jobs_oldest_waiting_seconds", "job"] == 0.0
