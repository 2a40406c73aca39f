"""A server process with a scripted engine: `python -m tests.apt_serve.jobs.served PORT TOKEN_DELAY_S SETTINGS`."""

from __future__ import annotations

import json
import sys

import uvicorn

from apt_core.config import parse
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.server import log_to_stderr
from tests.apt_serve.api.scripted_engine import Script, ScriptedEngine


def main(port: str, token_delay_s: str, settings: str) -> None:
    log_to_stderr()
    prometheus = PrometheusMetrics("scripted")
    engine = ScriptedEngine(prometheus, script=Script(token_delay_s=float(token_delay_s)))
    app = create_app(parse(ServerConfig, json.loads(settings)), engine, prometheus)
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
