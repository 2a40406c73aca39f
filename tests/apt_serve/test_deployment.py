from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest

from apt_core.config import parse, settings
from apt_core.errors import ConfigError
from apt_serve.config import ApiConfig, ServerConfig
from apt_serve.config_file import ConfigFile, HttpOptions, default_config_file, read_config_file
from apt_serve.engine.config import EngineConfig

CONFIG_FILE = Path(__file__).parents[2] / "deploy" / "config.yaml"


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def test_the_shipped_file_states_every_setting_with_its_default() -> None:
    args = read_config_file(CONFIG_FILE).args
    assert set(flat(args)) == {setting.name for setting in settings(ServerConfig)}
    assert parse(ServerConfig, args) == ServerConfig()


def test_every_setting_in_the_shipped_file_has_a_comment() -> None:
    lines = CONFIG_FILE.read_text(encoding="utf-8").splitlines()
    names = {setting.name.rpartition(".")[2] for setting in settings(ServerConfig)}
    assert not [line for line in lines if line.strip().partition(":")[0] in names and "  # " not in line]


def test_the_shipped_file_is_what_holds_without_one() -> None:
    file = read_config_file(CONFIG_FILE)
    assert file.http_options == default_config_file().http_options == HttpOptions()
    assert file.proxy_location == default_config_file().proxy_location


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: []", "applications: must hold exactly one, got 0"),
        ("applications: [{import_path: 'a:b'}]", "applications.0.import_path: must be 'apt_serve.deployment:build'"),
        ("applications: [{}]\nhttp_option: {}", "http_option: unknown setting; did you mean http_options?"),
        ("applications: [{}]\nhttp_options: {port: 0}", "http_options.port: must be between 1 and 65535, got 0"),
        ("applications: [{}]\nhttp_options: {prt: 1}", "http_options.prt: unknown setting; did you mean port?"),
    ],
)
def test_a_file_for_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config_file(path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")],
)
def test_the_url_is_one_that_can_be_called(host: str, url: str) -> None:
    assert HttpOptions(host=host).url == url


def test_a_files_args_are_the_applications() -> None:
    file = parse(ConfigFile, {"applications": [{"args": {"replicas": 2}}]})
    assert file.args == {"replicas": 2}


class TestApplication:
    """What Serve is told. Building an application starts nothing."""

    @pytest.fixture
    def deployment(self) -> Any:
        return pytest.importorskip("apt_serve.deployment")

    def options(self, deployment: Any, config: ServerConfig) -> Any:
        return deployment.application(config)._bound_deployment

    def test_the_builder_takes_one_plain_dict(self, deployment: Any) -> None:
        assert list(inspect.signature(deployment.build).parameters) == ["args"]
        assert deployment.build({"replicas": 2})._bound_deployment.num_replicas == 2

    def test_the_builder_names_an_unknown_setting(self, deployment: Any) -> None:
        with pytest.raises(ConfigError, match=r"^model\.max_num_seq: unknown setting; did you mean max_num_seqs\?$"):
            deployment.build({"model": {"max_num_seq": 1}})

    def test_the_engines_queue_fills_up_before_serves(self, deployment: Any) -> None:
        bound = self.options(deployment, ServerConfig(EngineConfig(max_num_seqs=8, max_waiting_requests=100)))
        assert bound.max_ongoing_requests == 8 + 100 + deployment.CONNECTION_HEADROOM
        assert bound.max_queued_requests == deployment.QUEUED_AT_PROXY

    def test_a_replica_gets_the_grace_period_to_stop(self, deployment: Any) -> None:
        bound = self.options(deployment, ServerConfig(api=ApiConfig(shutdown_grace_s=7)))
        assert bound._deployment_config.graceful_shutdown_timeout_s == 7 + deployment.LINGER_S

    def test_replicas_fit_on_a_small_machine(self, deployment: Any) -> None:
        options = self.options(deployment, ServerConfig(replicas=4)).ray_actor_options
        assert 4 * options["num_cpus"] <= min(1, os.cpu_count() or 1)
        assert "num_gpus" not in options

    def test_a_replica_on_a_gpu_asks_for_one(self, deployment: Any) -> None:
        options = self.options(deployment, ServerConfig(EngineConfig(device="cuda"))).ray_actor_options
        assert options["num_gpus"] == 1
