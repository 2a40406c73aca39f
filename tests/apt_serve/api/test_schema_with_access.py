"""With access control too, whatever a client sends ends without a server error: with credentials, and with none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from apt_serve.access.config import AccessConfig
from apt_serve.api.access import PUBLIC_PATHS
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.records.config import RecordsConfig
from tests.apt_serve.api.live_server import LiveServer
from tests.apt_serve.api.scripted_engine import ScriptedEngine

ADMIN_TOKEN = "correct-horse-battery-staple"
CONFIG = ServerConfig(access=AccessConfig(enabled=True, public_metrics=False), admin=AdminConfig(token=ADMIN_TOKEN))
SETTINGS = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
_METRICS = PrometheusMetrics("scripted")
schema = schemathesis.openapi.from_dict(create_app(CONFIG, ScriptedEngine(_METRICS), _METRICS).openapi())


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with access control and records of its own."""
    metrics = PrometheusMetrics("scripted")
    records = RecordsConfig(folder=str(tmp_path_factory.mktemp("records")))
    config = ServerConfig(access=CONFIG.access, admin=CONFIG.admin, records=records)
    with LiveServer(create_app(config, ScriptedEngine(metrics), metrics)) as server:
        yield server.base_url


@schema.parametrize()
@SETTINGS
def test_who_may_do_everything_gets_no_server_error(case: schemathesis.Case, base_url: str) -> None:
    response = case.call(base_url=base_url, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
    assert response.status_code < 500, response.text
    assert response.status_code != 401


@schema.parametrize()
@SETTINGS
def test_nobody_gets_anything_but_a_refusal(case: schemathesis.Case, base_url: str) -> None:
    response = case.call(base_url=base_url, headers={"Authorization": ""})
    if case.path not in PUBLIC_PATHS:
        assert 400 <= response.status_code < 500, response.text
