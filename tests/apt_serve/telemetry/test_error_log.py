"""Faults of the server: what is kept of them, and what `apt-serve errors` says."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.cli import USAGE_ERROR, main
from apt_serve.engine.client import GenerationRequest
from apt_serve.records.config import RecordsConfig
from apt_serve.telemetry.config import TelemetryConfig
from apt_serve.telemetry.error_log import ErrorLog, server_errors
from tests.apt_serve.api.conftest import CONFIG
from tests.apt_serve.api.live_server import LiveServer
from tests.apt_serve.api.scripted_engine import ScriptedEngine

PROMPT = "a prompt that nobody may keep"
BODY = {"prompt": PROMPT, "max_tokens": 2}


def broken_server(folder: Path, telemetry: TelemetryConfig | None = None) -> LiveServer:
    """One with a fault in the way of every generation."""

    class Broken(ScriptedEngine):
        def check(self, request: GenerationRequest) -> None:
            raise RuntimeError("block 17 is free already")

    config = replace(CONFIG, records=RecordsConfig(folder=str(folder)), telemetry=telemetry or TelemetryConfig())
    prometheus = PrometheusMetrics("scripted")
    return LiveServer(create_app(config, Broken(prometheus), prometheus))


def kept(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "errors").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_fault_is_kept_with_its_request_and_without_the_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    with broken_server(folder) as server:
        assert httpx.post(f"{server.base_url}/v1/completions", json={"prompt": 7}).status_code == 400
        assert not folder.exists()  # who is refused is no fault
        answer = httpx.post(f"{server.base_url}/v1/completions", json=BODY)
        assert answer.status_code == 500
    [record] = kept(folder)
    assert (record["kind"], record["message"]) == ("RuntimeError", "block 17 is free already")
    assert "in check" in record["traceback"]
    assert record["context"]["request_id"] == answer.headers["x-request-id"]
    assert record["context"]["route"] == "POST /v1/completions"
    assert PROMPT not in json.dumps(record)
    logging.getLogger("apt_serve").error("when the server has stopped")
    assert len(kept(folder)) == 1


def test_a_fault_on_a_socket_is_kept(tmp_path: Path) -> None:
    with (
        broken_server(tmp_path) as server,
        connect(server.base_url.replace("http", "ws", 1) + "/ws/generate") as socket,
    ):
        socket.send(json.dumps({"type": "generate", "id": "1", "prompt": PROMPT}))
        assert json.loads(socket.recv(timeout=30))["error"]["code"] == "internal_error"
    [record] = kept(tmp_path)
    assert record["context"]["route"] == "MESSAGE /ws/generate"
    assert PROMPT not in json.dumps(record)


def test_what_is_said_without_an_exception_is_kept_under_the_name_of_who_says_it(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path)
    log.start()
    logging.getLogger("apt_serve.limits.storage").error("Redis does not answer (%s)", "no route to host")
    logging.getLogger("apt_serve.limits.storage").warning("Redis is back")
    log.stop()
    [cause] = server_errors(tmp_path).analyze_error_patterns().causes
    assert cause.name == "apt_serve.limits.storage: Redis does not answer (no route to host)"


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    with broken_server(tmp_path, TelemetryConfig(error_log=False)) as server:
        assert httpx.post(f"{server.base_url}/v1/completions", json=BODY).status_code == 500
    assert not kept(tmp_path)


def test_a_disk_that_takes_nothing_changes_no_answer(tmp_path: Path) -> None:
    folder = tmp_path / "a file"
    folder.write_text("")
    with broken_server(folder) as server:
        answer = httpx.post(f"{server.base_url}/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


def test_the_command_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, page = tmp_path / "config.yaml", tmp_path / "errors.html"
    config.write_text(f"applications: [{{args: {{records: {{folder: {tmp_path / 'records'}}}}}}}]")
    with broken_server(tmp_path / "records") as server:
        for _ in range(3):
            httpx.post(f"{server.base_url}/v1/completions", json=BODY)
    capsys.readouterr()
    assert main(["errors", "--config", str(config), "--html", str(page)]) == 0
    report = capsys.readouterr().out
    assert "| RuntimeError: block # is free already | 3 | POST /v1/completions | - |" in report
    assert "in check" in report and "in check" in page.read_text(encoding="utf-8")
    assert main(["errors", "--config", str(config), "--days", "0.0000001"]) == 0
    assert "No errors were logged." in capsys.readouterr().out
    assert main(["errors", "--config", str(config), "--days", "0"]) == USAGE_ERROR
    assert main(["errors", "--config", str(config), "--html", str(tmp_path)]) == USAGE_ERROR
