"""The server does what /openapi.json says: schemathesis makes requests from it, valid and not."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from tests.apt_serve.api.scripted_engine import ScriptedEngine

_METRICS = PrometheusMetrics("scripted")
_APP = create_app(ServerConfig(), ScriptedEngine(_METRICS), _METRICS)
schema = schemathesis.openapi.from_asgi("/openapi.json", _APP)


@schema.parametrize()
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_requests_made_from_the_schema(case: schemathesis.Case) -> None:
    # Some rules lie beyond a schema: max_tokens 0 needs echo, a token id must exist in this model.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
