"""The servers that gRPC tests talk to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from apt_serve.records.config import RecordsConfig
from tests.apt_serve.api.conftest import CONFIG
from tests.apt_serve.api.scripted_engine import Script
from tests.apt_serve.rpc.live_grpc import LiveGrpc


@pytest.fixture(scope="session")
def _live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGrpc]:
    records = RecordsConfig(folder=str(tmp_path_factory.mktemp("records")))
    with LiveGrpc(replace(CONFIG, records=records)) as live:
        yield live


@pytest.fixture
def live(_live: LiveGrpc) -> LiveGrpc:
    """A server with a fresh script."""
    _live.engine.script = Script()
    _live.engine.aborted.clear()
    _live.engine.seen.clear()
    return _live
