"""Whose requests are counted, on every way in, and who may see it."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from websockets.sync.client import connect

from apt_serve.access.config import AccessConfig
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.records.config import SQLITE_FILE, RecordsConfig
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import ScriptedEngine

ADMIN_TOKEN = "correct-horse-battery-staple"
PATH = "/v1/organization/usage/completions"
DAY_S = 86400
BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@dataclass(frozen=True)
class Served:
    http: httpx.Client
    engine: ScriptedEngine
    folder: Path

    def key(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/admin/keys", json={"owner": "alice"} | fields, headers=bearer(ADMIN_TOKEN))
        key: dict[str, Any] = answer.raise_for_status().json()
        return key

    def usage(self, token: str = ADMIN_TOKEN, **query: Any) -> list[dict[str, Any]]:
        """Results of the last two days."""
        start = {"start_time": int(time.time()) - DAY_S}
        answer = self.http.get(PATH, params=start | query, headers=bearer(token)).raise_for_status().json()
        return [result for bucket in answer["data"] for result in bucket["results"]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    config = ServerConfig(
        access=AccessConfig(enabled=True),
        admin=AdminConfig(token=ADMIN_TOKEN),
        records=RecordsConfig(folder=str(tmp_path)),
    )
    prometheus = PrometheusMetrics("scripted")
    engine = ScriptedEngine(prometheus)
    app = create_app(config, engine, prometheus)
    with LiveServer(app) as live, httpx.Client(base_url=live.base_url, timeout=30) as http:
        yield Served(http, engine, tmp_path)


def test_every_way_in_is_counted_for_its_owner_and_key(server: Served) -> None:
    key = server.key(scopes=["inference", "jobs"])
    headers = bearer(key["key"])
    assert server.http.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    assert server.http.post("/v1/completions", json=BODY | {"stream": True}, headers=headers).status_code == 200
    with connect(str(server.http.base_url).replace("http", "ws", 1) + "/ws/generate", additional_headers=headers) as ws:
        ws.send(json.dumps({"type": "generate", "id": "a", **BODY}))
        while json.loads(ws.recv())["type"] != "finish":
            pass
    job = {"endpoint": "/v1/completions", "body": BODY}
    assert server.http.post("/v1/jobs", json=job, headers=headers).status_code == 202
    wait_until(lambda: [result["num_model_requests"] for result in server.usage()] == [4])
    mine, of_job = server.usage(group_by=["user_id", "api_key_id", "model", "batch"])
    if mine["batch"]:
        mine, of_job = of_job, mine
    common = {"object": "organization.usage.completions.result", "project_id": None, "service_tier": None}
    common |= {"user_id": "alice", "model": "scripted"}
    expected = {
        "num_model_requests": 3,
        "input_tokens": 9,
        "input_cached_tokens": 3,
        "output_tokens": 12,
        "api_key_id": key["id"],
        "batch": False,
    }
    assert mine == common | expected
    assert of_job == common | {
        "num_model_requests": 1,
        "input_tokens": 3,
        "input_cached_tokens": 1,
        "output_tokens": 4,
        "api_key_id": None,
        "batch": True,
    }


def test_who_leaves_is_counted_for_what_was_made_and_who_is_refused_is_not(server: Served) -> None:
    headers = bearer(server.key()["key"])
    assert server.http.post("/v1/completions", json=BODY | {"max_tokens": -1}, headers=headers).status_code == 400
    server.engine.script.is_overloaded = True
    assert server.http.post("/v1/completions", json=BODY, headers=headers).status_code == 503
    assert server.usage() == []
    server.engine.script.is_overloaded = False
    server.engine.script.token_delay_s = 0.05
    body = BODY | {"max_tokens": 1000, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        assert next(lines)
    wait_until(lambda: len(server.usage()) == 1)
    [left] = server.usage()
    assert left["num_model_requests"] == 1
    assert left["input_tokens"] == 3
    assert 1 <= left["output_tokens"] < 1000


def test_openais_client_reads_it_page_by_page(server: Served) -> None:
    server.http.post("/v1/completions", json=BODY, headers=bearer(server.key()["key"])).raise_for_status()
    with openai.OpenAI(api_key="-", admin_api_key=ADMIN_TOKEN, base_url=f"{server.http.base_url}/v1") as client:
        usage, start = client.admin.organization.usage, int(time.time()) // DAY_S * DAY_S - 3 * DAY_S
        page = usage.completions(start_time=start, limit=3, group_by=["user_id", "model"], user_ids=["alice"])
        assert [bucket.start_time for bucket in page.data] == [start, start + DAY_S, start + 2 * DAY_S]
        assert [bucket.end_time - bucket.start_time for bucket in page.data] == [DAY_S] * 3
        assert page.has_more and page.next_page
        rest = usage.completions(start_time=start, limit=3, group_by=["user_id", "model"], page=page.next_page)
        assert not rest.has_more and rest.next_page is None
        [result] = [result for bucket in (*page.data, *rest.data) for result in bucket.results]
        assert result.to_dict()["user_id"] == "alice"
        assert not usage.completions(start_time=start, limit=4, user_ids=["bob"]).data[-1].results
        hours = usage.completions(start_time=int(time.time()) - 7200, bucket_width="1h").data
        assert [bucket.end_time - bucket.start_time for bucket in hours] == [3600] * len(hours)
        assert hours[-1].end_time > time.time()


def test_others_see_their_own_alone(server: Served) -> None:
    alice, bob = server.key()["key"], server.key(owner="bob")["key"]
    for token in (alice, bob, bob):
        server.http.post("/v1/completions", json=BODY, headers=bearer(token)).raise_for_status()
    assert [result["num_model_requests"] for result in server.usage(bob)] == [2]
    assert [result["user_id"] for result in server.usage(bob, group_by="user_id", user_ids="bob")] == ["bob"]
    assert [result["num_model_requests"] for result in server.usage()] == [3]
    refused = server.http.get(PATH, params={"start_time": 0, "user_ids": "alice"}, headers=bearer(bob))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert server.http.get(PATH, params={"start_time": 0}).status_code == 401
    for_jobs, for_admins = server.key(owner="carol", scopes=["jobs"]), server.key(owner="dora", scopes=["admin"])
    assert server.http.get(PATH, params={"start_time": 0}, headers=bearer(for_jobs["key"])).status_code == 403
    assert [result["num_model_requests"] for result in server.usage(for_admins["key"])] == [3]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "start_time"),
        ({"start_time": "soon"}, "start_time"),
        ({"start_time": -1}, "start_time"),
        ({"start_time": 5, "end_time": 5}, "end_time"),
        ({"start_time": 0, "bucket_width": "1m"}, "bucket_width"),
        ({"start_time": 0, "limit": 32}, "limit"),
        ({"start_time": 0, "limit": 0}, "limit"),
        ({"start_time": 0, "page": "x"}, "page"),
        ({"start_time": 0, "group_by[]": "shoe_size"}, "group_by.0"),
        ({"start_time": 0, "project_ids[]": "p"}, "project_ids"),
        ({"start_time": 0, "group_by": "\ud800".encode("utf-8", "surrogatepass")}, "group_by.0"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(server: Served, query: dict[str, Any], param: str) -> None:
    answer = server.http.get(PATH, params=query, headers=bearer(ADMIN_TOKEN))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_records_that_do_not_answer_are_a_503_that_tells_nothing_of_them(server: Served) -> None:
    headers = bearer(server.key(scopes=["inference", "jobs"])["key"])
    server.usage()
    with sqlite3.connect(server.folder / SQLITE_FILE) as connection:
        for table in ("apt_usage", "apt_jobs", "apt_files"):
            connection.execute(f"DROP TABLE {table}")
    for path in (f"{PATH}?start_time=0", "/v1/batches", "/v1/files"):
        answer = server.http.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "records_unavailable")
        assert str(server.folder) not in answer.text
