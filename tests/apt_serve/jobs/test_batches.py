"""/v1/batches as OpenAI's client sees it."""

from __future__ import annotations

import time

import openai
import pytest
from openai.types import Batch

from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.jobs.conftest import Jobs, line


def start(jobs: Jobs, file_id: str, **options: object) -> str:
    """The id of a new batch."""
    arguments = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"} | options
    return jobs.client.batches.create(**arguments).id  # type: ignore[arg-type]


def ended(jobs: Jobs, batch_id: str) -> Batch:
    """The batch when it has ended."""
    deadline = time.monotonic() + 60
    while (batch := jobs.client.batches.retrieve(batch_id)).status not in (
        "completed",
        "failed",
        "expired",
        "cancelled",
    ):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def test_lines_are_answered_in_order_and_errors_have_a_file_of_their_own(jobs: Jobs) -> None:
    bad = line("bad", temperature=9)
    names = [f"line-{number}" for number in range(20)]
    file_id = jobs.upload(*(line(name) for name in names[:10]), bad, "", *(line(name) for name in names[10:]))
    batch = ended(jobs, start(jobs, file_id, metadata={"for": "test"}))
    assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"for": "test"})
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (21, 20, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at  # type: ignore[operator]
    outputs = jobs.lines_of(batch.output_file_id)
    assert [each["custom_id"] for each in outputs] == names
    for each in outputs:
        assert each["error"] is None
        assert each["response"]["status_code"] == 200  # type: ignore[index]
        assert each["response"]["body"]["choices"][0]["text"] == "Once"  # type: ignore[index]
    [error] = jobs.lines_of(batch.error_file_id)
    assert error["custom_id"] == "bad"
    assert error["response"]["status_code"] == 400  # type: ignore[index]
    assert error["response"]["body"]["error"]["param"] == "temperature"  # type: ignore[index]


def test_its_requests_are_the_owners(jobs: Jobs) -> None:
    ended(jobs, start(jobs, jobs.upload(line("a"))))
    assert [request.tenant for request in jobs.engine.seen] == [jobs.owner]


def test_at_most_so_many_lines_run_at_a_time(jobs: Jobs) -> None:
    jobs.engine.script.token_delay_s = 0.02
    batch_id = start(jobs, jobs.upload(*(line(str(number)) for number in range(12))))
    most = 0
    while jobs.client.batches.retrieve(batch_id).status != "completed":
        most = max(most, len(jobs.engine.running))
    assert 1 < most <= 4


@pytest.mark.parametrize(
    ("lines", "code", "place"),
    [
        (["{"], "invalid_json_line", 1),
        (["[" * 100_000], "invalid_json_line", 1),
        (['{"custom_id": NaN}'], "invalid_json_line", 1),
        (["[]"], "invalid_json_line", 1),
        ([line("a"), {"custom_id": "b"}], "missing_required_parameter", 2),
        ([line("a"), "", line("a")], "duplicate_custom_id", 3),
        ([line("a") | {"url": "/v1/files"}], "mismatched_endpoint", 1),
        ([line("a") | {"method": "GET"}], "invalid_method", 1),
        ([line("a") | {"body": []}], "invalid_body", 1),
        ([line("a") | {"custom_id": 7}], "invalid_custom_id", 1),
        (["x" * (4 * 1024 * 1024 + 1)], "line_too_long", 1),
        ([""], "empty_file", None),
    ],
)
def test_a_file_that_is_no_batch_fails_before_any_line_runs(
    jobs: Jobs, lines: list[dict[str, object] | str], code: str, place: int | None
) -> None:
    batch = ended(jobs, start(jobs, jobs.upload(*lines)))
    assert batch.status == "failed" and batch.errors and batch.errors.data
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, place)
    assert not jobs.engine.seen and batch.output_file_id is None


def test_cancelled_it_keeps_what_was_done(jobs: Jobs) -> None:
    names = [str(number) for number in range(40)]
    jobs.engine.script.token_delay_s = 0.03
    batch_id = start(jobs, jobs.upload(*map(line, names)))
    wait_until(lambda: jobs.client.batches.retrieve(batch_id).request_counts.completed >= 4)  # type: ignore[union-attr]
    assert jobs.client.batches.cancel(batch_id).status == "cancelling"
    batch = ended(jobs, batch_id)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    wait_until(lambda: not jobs.engine.running)
    done = [each["custom_id"] for each in jobs.lines_of(batch.output_file_id)]
    left = jobs.lines_of(batch.error_file_id)
    assert {each["error"]["code"] for each in left} == {"batch_cancelled"}  # type: ignore[index]
    assert sorted(done + [each["custom_id"] for each in left], key=names.index) == names  # type: ignore[arg-type]
    assert jobs.client.batches.cancel(batch_id).status == "cancelled"


def test_one_that_has_ended_cannot_be_cancelled(jobs: Jobs) -> None:
    batch_id = start(jobs, jobs.upload(line("a")))
    ended(jobs, batch_id)
    with pytest.raises(openai.ConflictError, match="completed"):
        jobs.client.batches.cancel(batch_id)


def test_the_file_of_a_running_batch_stays(jobs: Jobs) -> None:
    jobs.engine.script.token_delay_s = 0.05
    file_id = jobs.upload(*(line(str(number)) for number in range(8)))
    batch_id = start(jobs, file_id)
    with pytest.raises(openai.ConflictError):
        jobs.client.files.delete(file_id)
    ended(jobs, batch_id)
    assert jobs.client.files.delete(file_id).deleted


def test_streams_are_refused_line_by_line(jobs: Jobs) -> None:
    batch = ended(jobs, start(jobs, jobs.upload(line("a", stream=True))))
    [error] = jobs.lines_of(batch.error_file_id)
    assert error["response"]["body"]["error"]["param"] == "stream"  # type: ignore[index]


def test_a_line_waits_until_the_server_has_room(jobs: Jobs) -> None:
    jobs.engine.script.is_overloaded = True
    batch_id = start(jobs, jobs.upload(line("a")))
    wait_until(lambda: jobs.client.batches.retrieve(batch_id).status == "in_progress")
    time.sleep(0.1)
    jobs.engine.script.is_overloaded = False
    assert ended(jobs, batch_id).request_counts.completed == 1  # type: ignore[union-attr]


def test_batches_of_another_owner_are_not_there(jobs: Jobs) -> None:
    batch_id, bob = start(jobs, jobs.upload(line("a"))), {"X-Test-Owner": "bob"}
    assert jobs.http.get(f"/v1/batches/{batch_id}", headers=bob).status_code == 404
    assert jobs.http.post(f"/v1/batches/{batch_id}/cancel", headers=bob).status_code == 404
    assert jobs.http.get(f"/v1/batches?after={batch_id}", headers=bob).status_code == 404
    assert jobs.http.get("/v1/batches", headers=bob).json()["data"] == []
    ended(jobs, batch_id)


def test_pages_hold_every_batch_once(jobs: Jobs) -> None:
    file_id = jobs.upload(line("a"))
    ids = [start(jobs, file_id) for _ in range(5)]
    for batch_id in ids:
        ended(jobs, batch_id)
    assert [batch.id for batch in jobs.client.batches.list(limit=2)] == ids[::-1]


@pytest.mark.parametrize(
    "body",
    [
        {"completion_window": "soon"},
        {"endpoint": "/v1/files"},
        {"input_file_id": 7},
        {"metadata": {"a": "b" * 513}},
        {"surprise": 1},
        {"webhook_url": "https://user:password@example.com"},
        {"webhook_url": "ftp://example.com"},
        {"webhook_url": "https://a..b/"},
        {"webhook_url": f"https://{'a' * 64}.example.com/"},
    ],
)
def test_what_could_not_run_is_refused(jobs: Jobs, body: dict[str, object]) -> None:
    sound = {"input_file_id": jobs.upload(line("a")), "endpoint": "/v1/completions", "completion_window": "24h"}
    answer = jobs.http.post("/v1/batches", json=sound | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].split(".")[0] == next(iter(body))
