"""Alerts and dashboard: right by Prometheus' own tool, and about metrics that the server has."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import ServerConfig
from apt_serve.records.config import RecordsConfig
from apt_serve.telemetry.exchange import Exchange
from tests.apt_serve.api.scripted_engine import ScriptedEngine

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
ALERT_TESTS = (DEPLOY / "prometheus" / "alerts_test.yml").read_text(encoding="utf-8")
DASHBOARD = (DEPLOY / "grafana" / "dashboards" / "apt.json").read_text(encoding="utf-8")
DOCS = (DEPLOY.parent / "docs" / "observability.md").read_text(encoding="utf-8")
_SUFFIX = re.compile(r"_(total|bucket|count|sum|created)$")


def names_in(text: str) -> set[str]:
    return set(re.findall(r"apt:\w+", text))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Types of all metrics of a server, by name."""
    prometheus = PrometheusMetrics("m")
    config = replace(ServerConfig(), records=RecordsConfig(folder=str(tmp_path_factory.mktemp("records"))))
    engine = ScriptedEngine(prometheus)
    asyncio.run(engine.start())
    create_app(config, engine, prometheus)
    prometheus.exchanged(Exchange("id", "GET"))
    text = generate_latest(prometheus.registry).decode()
    families = text_string_to_metric_families(text)
    return {family.name: family.type for family in families if not family.name.endswith("_created")}


def exposed(families: dict[str, str]) -> set[str]:
    """Names as queries say them."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    return {name + suffix for name, kind in families.items() for suffix in suffixes[kind]}


def test_alerts_and_dashboard_name_metrics_that_exist(families: dict[str, str]) -> None:
    assert names_in(ALERTS + DASHBOARD) <= exposed(families)


def test_the_dashboard_shows_every_metric(families: dict[str, str]) -> None:
    assert {_SUFFIX.sub("", name) for name in names_in(DASHBOARD)} == set(families)


def test_the_docs_explain_every_metric_and_alert(families: dict[str, str]) -> None:
    assert {_SUFFIX.sub("", name) for name in names_in(DOCS)} == set(families)
    assert set(re.findall(r"alert: (\w+)", ALERTS)) == set(re.findall(r"`(Apt\w+)`", DOCS))


def test_every_alert_is_tested_both_ways() -> None:
    cases = [case for test in yaml.safe_load(ALERT_TESTS)["tests"] for case in test["alert_rule_test"]]
    names = set(re.findall(r"alert: (\w+)", ALERTS))
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "command", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")], ids=["config", "rules"]
)
def test_promtool_accepts(command: tuple[str, ...]) -> None:
    found = subprocess.run(
        ["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_dashboard_has_the_data_source_that_is_provisioned() -> None:
    path = DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    [source] = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    panels = json.loads(DASHBOARD)["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
