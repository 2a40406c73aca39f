"""/v1/jobs, and the webhook that tells of their end."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from apt_core.errors import ConfigError, InvalidRequestError
from apt_serve.jobs.config import JobsConfig
from apt_serve.jobs.job_store import JobStore
from apt_serve.jobs.records import JobRecord
from apt_serve.jobs.webhook import ForbiddenAddressError, Webhooks, is_public
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database
from apt_serve.telemetry.config import TelemetryConfig
from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.jobs.conftest import JOBS, SECRET, Jobs, make_server
from tests.apt_serve.telemetry.collector import Collector

BODY = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}


def submit(jobs: Jobs, **changes: object) -> dict[str, Any]:
    """A new job."""
    answer = jobs.http.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": BODY} | changes)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    return job


def ended(jobs: Jobs, job_id: str) -> dict[str, Any]:
    """The job when it has ended."""
    deadline = time.monotonic() + 60
    while (job := jobs.http.get(f"/v1/jobs/{job_id}").json())["status"] in ("queued", "in_progress", "cancelling"):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return dict(job)


def test_the_result_is_what_the_endpoint_answers(jobs: Jobs) -> None:
    job = submit(jobs, metadata={"a": "b"})
    assert (job["object"], job["status"], job["metadata"]) == ("job", "queued", {"a": "b"})
    assert ended(jobs, job["id"])["status"] == "completed"
    answer = jobs.http.get(f"/v1/jobs/{job['id']}/result")
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "Once")
    assert [each["id"] for each in jobs.http.get("/v1/jobs").json()["data"]] == [job["id"]]


def test_a_refused_request_fails_with_the_endpoints_error(jobs: Jobs) -> None:
    job = submit(jobs, body=BODY | {"max_tokens": -1})
    assert ended(jobs, job["id"])["status"] == "failed"
    answer = jobs.http.get(f"/v1/jobs/{job['id']}/result")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_an_engine_that_fails_is_asked_three_times(jobs: Jobs) -> None:
    jobs.engine.script.fail_after = 0
    job = submit(jobs)
    assert ended(jobs, job["id"])["status"] == "failed"
    assert len(jobs.engine.seen) == 3


def test_cancelled_it_stops_and_has_no_result(jobs: Jobs) -> None:
    jobs.engine.script.token_delay_s = 0.05
    job = submit(jobs, body=BODY | {"max_tokens": 2000})
    wait_until(lambda: jobs.engine.running)
    assert jobs.http.get(f"/v1/jobs/{job['id']}/result").status_code == 409
    assert jobs.http.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] in ("cancelling", "cancelled")
    assert ended(jobs, job["id"])["status"] == "cancelled"
    wait_until(lambda: not jobs.engine.running)
    assert jobs.http.get(f"/v1/jobs/{job['id']}/result").json()["error"]["code"] == "job_cancelled"


def test_a_job_of_another_owner_is_not_there(jobs: Jobs) -> None:
    job, bob = submit(jobs), {"X-Test-Owner": "bob"}
    for url in (f"/v1/jobs/{job['id']}", f"/v1/jobs/{job['id']}/result"):
        assert jobs.http.get(url, headers=bob).status_code == 404
    assert jobs.http.post(f"/v1/jobs/{job['id']}/cancel", headers=bob).status_code == 404
    assert jobs.http.get(f"/v1/batches/{job['id']}").status_code == 404
    assert jobs.http.get("/v1/jobs", headers=bob).json()["data"] == []
    ended(jobs, job["id"])


def test_an_owner_may_have_so_many_that_have_not_ended(jobs: Jobs) -> None:
    jobs.engine.script.is_overloaded = True
    found = [submit(jobs) for _ in range(JOBS.max_unfinished)]
    refused = jobs.http.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": BODY})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_jobs")
    for job in found:
        jobs.http.post(f"/v1/jobs/{job['id']}/cancel")
    for job in found:
        ended(jobs, job["id"])


def test_a_body_that_is_deep_or_large_is_refused(jobs: Jobs) -> None:
    deep = b'{"endpoint": "/v1/completions", "body": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001
    headers = {"Content-Type": "application/json"}
    assert jobs.http.post("/v1/jobs", content=deep, headers=headers).json()["error"]["code"] == "invalid_json"
    large = b'{"endpoint": "/v1/completions", "body": {"prompt": "' + b"a" * (4 * 1024 * 1024) + b'"}}'
    assert jobs.http.post("/v1/jobs", content=large, headers=headers).status_code == 413


@dataclass
class Receiver:
    """Somebody's webhook; fails as often as it is told."""

    url: str = ""
    failures: int = 0
    is_endless: bool = False
    """Whether its answers never end."""
    calls: queue.Queue[tuple[dict[str, str], bytes]] = field(default_factory=queue.Queue)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """On a free port."""
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.failures -= 1
            self.send_response(200 if found.failures < 0 else 302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            found.calls.put((dict(self.headers), body))
            with suppress(ConnectionError):
                while found.is_endless:
                    self.wfile.write(bytes(65536))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        found.url = f"http://localhost:{server.server_port}/hook"
        yield found
        found.is_endless = False
        server.shutdown()
        thread.join()


def test_a_webhook_is_signed_so_that_openais_client_knows_it(jobs: Jobs, receiver: Receiver) -> None:
    file_id = jobs.upload({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": BODY})
    batch = jobs.client.batches.create(
        input_file_id=file_id,
        endpoint="/v1/completions",
        completion_window="24h",
        extra_body={"webhook_url": receiver.url},
    )
    headers, body = receiver.calls.get(timeout=30)
    event = jobs.client.webhooks.unwrap(body, headers, secret=SECRET)
    assert (event.type, event.data.id) == ("batch.completed", batch.id)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        jobs.client.webhooks.unwrap(body + b" ", headers, secret=SECRET)


def test_a_webhook_is_tried_again_with_the_same_id(
    jobs: Jobs, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_serve.jobs.webhook.RETRY_AFTER_S", (0.1, 0.1, 0.1))
    receiver.failures = 2
    job = submit(jobs, webhook_url=receiver.url)
    calls = [receiver.calls.get(timeout=30) for _ in range(3)]
    assert {headers["webhook-id"] for headers, _ in calls} == {f"evt_{job['id']}"}
    assert json.loads(calls[2][1])["type"] == "job.completed"
    time.sleep(0.3)
    assert receiver.calls.empty()


def test_the_answer_to_a_webhook_is_not_read(jobs: Jobs, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be tried again, after it had filled the memory."""
    monkeypatch.setattr("apt_serve.jobs.webhook._TIMEOUT_S", 1.0)
    monkeypatch.setattr("apt_serve.jobs.webhook.RETRY_AFTER_S", (0.1, 0.1, 0.1))
    receiver.is_endless = True
    submit(jobs, webhook_url=receiver.url)
    receiver.calls.get(timeout=30)
    with pytest.raises(queue.Empty):
        receiver.calls.get(timeout=3)


def test_a_webhook_that_fails_in_an_unexpected_way_is_not_tried_forever(
    jobs: Jobs, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def post(self: Webhooks, job: JobRecord, key: bytes) -> None:
        tries.put(job.id)
        raise RuntimeError("unexpected")

    tries: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(Webhooks, "_post", post)
    monkeypatch.setattr("apt_serve.jobs.webhook._TIMEOUT_S", 0.1)
    monkeypatch.setattr("apt_serve.jobs.webhook.RETRY_AFTER_S", (0.1,))
    job = submit(jobs, webhook_url=receiver.url)
    assert [tries.get(timeout=30) for _ in range(2)] == [job["id"]] * 2
    with pytest.raises(queue.Empty):
        tries.get(timeout=2)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fd00::1",
        "fe80::1",
        "::ffff:127.0.0.1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses_are_none_to_call(address: str) -> None:
    assert not is_public(address)


def test_public_addresses_are() -> None:
    assert is_public("93.184.215.14") and is_public("2606:2800:21f:cb07::1")


async def test_webhooks_into_the_own_network_are_refused(tmp_path: Path, receiver: Receiver) -> None:
    """Whatever name the address has; names are looked up when the webhook goes out."""
    store = JobStore(Database(RecordsConfig(folder=str(tmp_path))), lease_s=1)
    webhooks = Webhooks(store, b"k" * 24, allow_private=False)
    with pytest.raises(ForbiddenAddressError):
        await webhooks._address(httpx.URL(receiver.url))
    with pytest.raises(InvalidRequestError, match="https"):
        webhooks.check("http://example.com")
    webhooks.check("https://example.com/hook")
    with pytest.raises(InvalidRequestError, match="webhook_secret"):
        Webhooks(store, None, allow_private=False).check("https://example.com")
    await webhooks.close()


@pytest.mark.parametrize("secret", ["short", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ="])
def test_secrets_that_are_none_are_refused(secret: str) -> None:
    with pytest.raises(ConfigError, match="webhook_secret"):
        JobsConfig(webhook_secret=secret)


def test_a_jobs_request_and_its_webhook_continue_the_trace_of_its_submission(
    tmp_path: Path, receiver: Receiver, collector: Collector
) -> None:
    _, server = make_server(tmp_path, telemetry=TelemetryConfig(traces_endpoint=collector.url))
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    with server, httpx.Client(base_url=server.base_url, headers={"X-Test-Owner": "alice"}) as http:
        job = {"endpoint": "/v1/completions", "body": BODY, "webhook_url": receiver.url}
        traced = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
        submitted = http.post("/v1/jobs", json=job, headers=traced)
        headers, _ = receiver.calls.get(timeout=30)
    assert headers["traceparent"] == submitted.headers["traceparent"]
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == trace_id}
    assert spans["POST /v1/completions"].parent_span_id == spans["POST /v1/jobs"].span_id
