"""Servers with jobs: a scripted engine, records in a folder of the test's own, callers named by a header."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from apt_serve.access.identity import LOCAL
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.jobs.config import JobsConfig
from apt_serve.records.config import RecordsConfig
from apt_serve.telemetry.config import TelemetryConfig
from tests.apt_serve.api.live_server import LiveServer
from tests.apt_serve.api.scripted_engine import Script, ScriptedEngine

SECRET = "whsec_" + "c2VjcmV0" * 4
MIB = 1024 * 1024
JOBS = JobsConfig(
    poll_s=0.05,
    lease_s=1.0,
    concurrency=4,
    max_file_bytes=8 * MIB,
    max_stored_bytes=16 * MIB,
    max_unfinished=20,
    webhook_secret=SECRET,
    webhook_allow_private=True,
)

NO_TELEMETRY = TelemetryConfig()


class Callers:
    """Takes whoever the header names for the caller, as the access room would."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "identity" not in scope.get("state", {}):
            owner = Headers(scope=scope).get("X-Test-Owner", "nobody")
            scope.setdefault("state", {})["identity"] = replace(LOCAL, owner=owner)
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class Jobs:
    """A running server, and how to talk to it."""

    engine: ScriptedEngine
    http: httpx.Client
    client: openai.OpenAI
    folder: Path
    owner: str

    def upload(self, *lines: dict[str, object] | str) -> str:
        """The id of a file with these lines."""
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        return self.client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id

    def lines_of(self, file_id: str | None) -> list[dict[str, object]]:
        """What is in a file."""
        assert file_id is not None
        return [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()]


def line(name: str, **body: object) -> dict[str, object]:
    """A line of a batch."""
    body = {"prompt": name, "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def make_server(
    folder: Path, jobs: JobsConfig = JOBS, telemetry: TelemetryConfig = NO_TELEMETRY
) -> tuple[ScriptedEngine, LiveServer]:
    """Not yet started."""
    prometheus = PrometheusMetrics("scripted")
    engine = ScriptedEngine(prometheus)
    config = ServerConfig(jobs=jobs, records=RecordsConfig(folder=str(folder)), telemetry=telemetry)
    app = create_app(config, engine, prometheus)
    app.add_middleware(Callers)
    return engine, LiveServer(app)


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, LiveServer, Path]]:
    folder = tmp_path_factory.mktemp("jobs") / "records"
    engine, server = make_server(folder)
    with server:
        yield engine, server, folder


_numbers = itertools.count()


@pytest.fixture
def jobs(_server: tuple[ScriptedEngine, LiveServer, Path]) -> Iterator[Jobs]:
    """A server whose replica runs its jobs, and an owner nobody has seen."""
    engine, server, folder = _server
    engine.script = Script()
    engine.seen.clear()
    headers = {"X-Test-Owner": f"owner-{next(_numbers)}"}
    with (
        httpx.Client(base_url=server.base_url, timeout=30, headers=headers) as http,
        openai.OpenAI(
            base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, default_headers=headers
        ) as client,
    ):
        yield Jobs(engine, http, client, folder, headers["X-Test-Owner"])
