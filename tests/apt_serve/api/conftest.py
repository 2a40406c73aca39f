"""The servers that API tests talk to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import httpx
import pytest

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ApiConfig, ServerConfig
from apt_serve.engine.client import Capability
from apt_serve.records.config import RecordsConfig
from tests.apt_serve.api.live_server import LiveServer
from tests.apt_serve.api.scripted_engine import Script, ScriptedEngine


@dataclass(frozen=True)
class Endpoint:
    """A running server. Tests of the contract know no more of it than this."""

    base_url: str
    model: str
    capabilities: frozenset[Capability]
    grpc_address: str = ""

    @property
    def websocket_url(self) -> str:
        return self.base_url.replace("http", "ws", 1) + "/ws/generate"


@dataclass(frozen=True)
class ScriptedServer:
    """A server whose engine does what a test tells it to."""

    endpoint: Endpoint
    engine: ScriptedEngine
    config: ServerConfig

    @property
    def base_url(self) -> str:
        return self.endpoint.base_url


CONFIG = ServerConfig(
    api=ApiConfig(
        request_timeout_s=60.0,
        max_body_bytes=1024 * 1024,
        max_generations_per_websocket=4,
        cors_allow_origins=("https://friend.example",),
    )
)


@pytest.fixture(scope="session")
def _scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    config = replace(CONFIG, records=RecordsConfig(folder=str(tmp_path_factory.mktemp("records"))))
    prometheus = PrometheusMetrics("scripted")
    engine = ScriptedEngine(prometheus)
    with LiveServer(create_app(config, engine, prometheus)) as server:
        endpoint = Endpoint(server.base_url, "scripted", engine.capabilities)
        yield ScriptedServer(endpoint, engine, config)


@pytest.fixture
def scripted(_scripted_server: ScriptedServer) -> ScriptedServer:
    """A server with a fresh script."""
    engine = _scripted_server.engine
    engine.script = Script()
    engine.aborted.clear()
    engine.seen.clear()
    return _scripted_server


@pytest.fixture
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    """The server whose contract is tested: APT_TEST_BASE_URL if it is set, else the scripted one.

    Tests that tell the engine what to do ask for ``scripted`` too, and then it is always that one.
    """
    base_url = os.environ.get("APT_TEST_BASE_URL")
    if base_url is None or "scripted" in request.fixturenames:
        server: ScriptedServer = request.getfixturevalue("scripted")
        return server.endpoint
    [model] = httpx.get(f"{base_url}/models").json()["models"]
    return Endpoint(base_url, model["name"], frozenset(map(Capability, model["capabilities"])))


@pytest.fixture
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    """A client of the endpoint."""
    with httpx.Client(base_url=endpoint.base_url, timeout=30) as client:
        yield client
