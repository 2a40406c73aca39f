"""Whatever /openapi.json allows a client to send, a real engine answers without a server error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.engine import async_engine
from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.config import EngineConfig
from tests.apt_serve.api.live_server import LiveServer
from tests.apt_serve.engine.tiny_engine import tiny_engine

CONFIG = EngineConfig(block_size=4, max_num_seqs=8, max_num_batched_tokens=32)
schema = schemathesis.openapi.from_dict(
    create_app(ServerConfig(CONFIG), AsyncEngine(CONFIG), PrometheusMetrics("tiny")).openapi()
)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """A server whose real engine runs a tiny random model."""
    metrics = PrometheusMetrics("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_engine, "Engine", lambda config, sink: tiny_engine(metrics=sink))
        with LiveServer(create_app(ServerConfig(CONFIG), AsyncEngine(CONFIG, metrics), metrics)) as server:
            yield server.base_url


@schema.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_no_request_makes_a_server_error(case: schemathesis.Case, base_url: str) -> None:
    response = case.call(base_url=base_url)
    assert response.status_code < 500, response.text
