"""/admin/weights: who may, what may be loaded, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from apt_core.errors import ConfigError
from apt_core.manifest import UNPUBLISHED, make_manifest, write_manifest
from apt_serve.api.app import create_app
from apt_serve.api.current_weights import current_model, pointer_file, read_pointer, write_pointer
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.engine.client import Capability, WeightsReplacedError
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import ScriptedEngine

TOKEN = "correct-horse-battery-staple"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@dataclass(frozen=True)
class Admin:
    """A server with an admin token, and the folder that it may load from."""

    http: httpx.Client
    engine: ScriptedEngine
    config: ServerConfig
    folder: Path

    def post(self, path: object, **body: Any) -> httpx.Response:
        return self.http.post("/admin/weights", json={"path": str(path), **body}, headers=AUTHORIZED)

    def get(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/admin/weights", headers=AUTHORIZED).raise_for_status().json()
        return answer

    def wait(self) -> dict[str, Any]:
        """The first replica, once its swap has ended."""
        wait_until(lambda: self.get()["replicas"][0]["swap"]["phase"] in ("done", "failed"), timeout_s=30)
        replica: dict[str, Any] = self.get()["replicas"][0]
        return replica


def published(folder: Path, step: int = 1) -> str:
    """A folder with a manifest; its version."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest = make_manifest(folder, step)
    write_manifest(folder, manifest)
    return manifest.version


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Admin]:
    folder = tmp_path / "weights"
    folder.mkdir()
    config = ServerConfig(admin=AdminConfig(token=TOKEN, weight_folders=(str(folder),), swap_timeout_s=5.0))
    prometheus = PrometheusMetrics("scripted")
    engine = ScriptedEngine(prometheus)
    with (
        LiveServer(create_app(config, engine, prometheus)) as server,
        httpx.Client(base_url=server.base_url, timeout=30) as http,
    ):
        yield Admin(http, engine, config, folder)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_without_a_token_there_is_no_such_endpoint(scripted: Any) -> None:
    response = httpx.post(f"{scripted.base_url}/admin/weights", json={"path": "/"}, headers=AUTHORIZED)
    assert error_of(response) == (404, "not_found", None)
    assert "/admin/weights" not in httpx.get(f"{scripted.base_url}/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer \xfc".encode("latin-1")},
    ],
)
def test_whoever_lacks_the_token_learns_and_does_nothing(admin: Admin, headers: Any) -> None:
    published(admin.folder / "a")
    for response in (
        admin.http.get("/admin/weights", headers=headers),
        admin.http.post("/admin/weights", json={"path": str(admin.folder / "a")}, headers=headers),
        admin.http.post("/admin/weights", content=b"no json", headers=headers),
    ):
        assert error_of(response) == (401, "invalid_admin_token", None)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert admin.engine.swap is None


def test_a_swap_is_begun_followed_and_noted_for_replicas_to_come(admin: Admin) -> None:
    version = published(admin.folder / "a")
    admin.engine.script.swap_s = 0.3
    response = admin.post(admin.folder / "a", swap="drain", timeout_s=7)
    assert response.status_code == 202
    [replica] = response.json()["replicas"]
    assert replica["weight_version"] == UNPUBLISHED
    assert (replica["swap"]["phase"], replica["swap"]["from_version"]) == ("loading", UNPUBLISHED)
    replica = admin.wait()
    assert replica["weight_version"] == version
    assert (replica["swap"]["phase"], replica["swap"]["to_version"], replica["swap"]["error"]) == (
        "done",
        version,
        None,
    )
    assert admin.engine.swap is not None
    assert (admin.engine.swap.order.mode, admin.engine.swap.order.timeout_s) == ("drain", 7)
    wait_until(lambda: read_pointer(admin.config) is not None)
    assert current_model(admin.config).source == str((admin.folder / "a").resolve())
    metrics = admin.http.get("/metrics").text
    assert 'apt:weight_swaps_total{model_name="scripted",outcome="done"} 1.0' in metrics
    assert f'apt:weight_version_info{{model_name="scripted",weight_version="{version}"}} 1.0' in metrics


def test_left_out_settings_are_the_servers(admin: Admin) -> None:
    published(admin.folder / "a")
    assert admin.post(admin.folder / "a").status_code == 202
    admin.wait()
    assert admin.engine.swap is not None
    assert (admin.engine.swap.order.mode, admin.engine.swap.order.timeout_s) == ("overlap", 5.0)


def test_a_failed_swap_says_why_and_nothing_is_noted(admin: Admin) -> None:
    published(admin.folder / "a")
    admin.engine.script.swap_error = "model.safetensors: its SHA-256 differs"
    assert admin.post(admin.folder / "a").status_code == 202
    replica = admin.wait()
    assert replica["weight_version"] == UNPUBLISHED
    assert (replica["swap"]["phase"], replica["swap"]["error"]) == ("failed", admin.engine.script.swap_error)
    assert read_pointer(admin.config) is None
    wait_until(lambda: 'outcome="failed"} 1.0' in admin.http.get("/metrics").text)


def test_a_second_swap_is_refused_while_one_runs(admin: Admin) -> None:
    published(admin.folder / "a")
    admin.engine.script.swap_s = 60
    assert admin.post(admin.folder / "a").status_code == 202
    assert error_of(admin.post(admin.folder / "a")) == (409, "swap_running", None)


def test_an_engine_that_cannot_says_so(admin: Admin) -> None:
    published(admin.folder / "a")
    admin.engine.capabilities = frozenset(Capability) - {Capability.WEIGHT_SWAP}
    assert error_of(admin.post(admin.folder / "a")) == (409, "swap_unsupported", None)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc", (403, "path_not_allowed", "path")),
        ("/absent/folder", (403, "path_not_allowed", "path")),
        ("{folder}/../elsewhere", (403, "path_not_allowed", "path")),
        ("{folder}/link", (403, "path_not_allowed", "path")),
        ("{folder}/with-link", (403, "path_not_allowed", "path")),
        ("{folder}-like", (403, "path_not_allowed", "path")),
        ("{folder}/absent", (400, "invalid_value", "path")),
        ("{folder}/a/config.json", (400, "invalid_value", "path")),
        ("weights/a", (400, "invalid_value", "path")),
        ("{folder}/a\0", (400, "invalid_value", "path")),
        ("", (400, "invalid_value", "path")),
    ],
)
def test_only_what_lies_below_the_folders_is_looked_at(admin: Admin, path: str, expected: object) -> None:
    published(admin.folder / "a")
    published(admin.folder.parent / "elsewhere")
    published(admin.folder.parent / "weights-like")
    (admin.folder / "link").symlink_to(admin.folder.parent / "elsewhere")
    published(admin.folder / "with-link")
    (admin.folder / "with-link" / "model.safetensors").symlink_to(admin.folder.parent / "elsewhere" / "config.json")
    assert error_of(admin.post(path.format(folder=admin.folder))) == expected
    assert admin.engine.swap is None


def test_a_link_that_stays_below_the_folders_is_followed(admin: Admin) -> None:
    version = published(admin.folder / "a")
    (admin.folder / "latest").symlink_to("a")
    assert admin.post(admin.folder / "latest").status_code == 202
    assert admin.wait()["weight_version"] == version


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (400, "missing_required_parameter", "path")),
        ({"path": 5}, (400, "invalid_value", "path")),
        ({"path": "/a", "swap": "now"}, (400, "invalid_value", "swap")),
        ({"path": "/a", "timeout_s": 0}, (400, "invalid_value", "timeout_s")),
        ({"path": "/a", "force": True}, (400, "unknown_parameter", "force")),
    ],
)
def test_a_faulty_order_is_refused_by_field(admin: Admin, body: Any, expected: object) -> None:
    assert error_of(admin.http.post("/admin/weights", json=body, headers=AUTHORIZED)) == expected


def test_every_answer_carries_its_weight_version(admin: Admin) -> None:
    version = published(admin.folder / "a")
    body = {"prompt": "a", "max_tokens": 2}
    before = admin.http.post("/v1/completions", json=body).json()
    assert before["weight_version"] == UNPUBLISHED
    assert admin.post(admin.folder / "a").status_code == 202
    admin.wait()
    whole = admin.http.post("/v1/completions", json=body)
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    answered = admin.http.post("/v1/chat/completions", json=chat)
    assert whole.headers["X-Weight-Version"] == answered.headers["X-Weight-Version"] == version
    assert whole.json()["weight_version"] == answered.json()["weight_version"] == version
    assert whole.json()["system_fingerprint"] == answered.json()["system_fingerprint"] != before["system_fingerprint"]
    for url, fields in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with admin.http.stream("POST", url, json=fields | options) as stream:
            assert stream.headers["X-Weight-Version"] == version
            chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        assert {chunk["weight_version"] for chunk in chunks} == {version}
        assert {chunk["system_fingerprint"] for chunk in chunks} == {whole.json()["system_fingerprint"]}
    simple = admin.http.post("/generate", json={"text": "a", "max_length": 2}).json()
    assert simple["weight_version"] == version
    assert admin.http.get("/v1/models").json()["data"][0]["weight_version"] == version
    assert admin.http.get("/models").json()["models"][0]["weight_version"] == version
    with connect(str(admin.http.base_url).replace("http", "ws", 1) + "/ws/generate") as socket:
        socket.send(json.dumps({"type": "generate", "id": "a", "prompt": "a", "max_tokens": 2}))
        assert json.loads(socket.recv())["weight_version"] == version


def test_all_prompts_of_a_request_ask_for_one_version(admin: Admin) -> None:
    admin.http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 1}).raise_for_status()
    assert [request.weight_version for request in admin.engine.seen] == [UNPUBLISHED] * 3


def test_a_generation_whose_weights_were_replaced_may_be_tried_again(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def replaced(self: object, request: object) -> Any:
        raise WeightsReplacedError("This ran on weight version 1-a, which 2-b has replaced.")
        yield

    monkeypatch.setattr(ScriptedEngine, "generate", replaced)
    response = admin.http.post("/v1/completions", json={"prompt": "a"})
    assert error_of(response) == (503, "weights_replaced", None)
    assert response.headers["Retry-After"] == "1"
    assert "1-a" in response.json()["error"]["message"]


class TestSettings:
    def test_the_token_is_not_shown(self) -> None:
        assert TOKEN not in repr(ServerConfig(admin=AdminConfig(token=TOKEN)))

    def test_the_environment_may_hold_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert AdminConfig().bearer_token is None
        monkeypatch.setenv("APT_ADMIN_TOKEN", TOKEN)
        assert AdminConfig().bearer_token == TOKEN
        monkeypatch.setenv("APT_ADMIN_TOKEN", "short")
        with pytest.raises(ConfigError, match="APT_ADMIN_TOKEN: must have at least 16 characters"):
            _ = AdminConfig().bearer_token

    @pytest.mark.parametrize(
        ("settings", "field"),
        [
            ({"token": "short"}, "admin.token"),
            ({"weight_folders": ("weights",)}, "admin.weight_folders"),
            ({"swap_timeout_s": 0}, "admin.swap_timeout_s"),
        ],
    )
    def test_what_cannot_work_is_refused_by_name(self, settings: Any, field: str) -> None:
        with pytest.raises(ConfigError) as caught:
            AdminConfig(**settings)
        assert caught.value.field == field


class TestPointer:
    @pytest.fixture
    def config(self, tmp_path: Path) -> ServerConfig:
        published(tmp_path / "weights" / "a")
        return ServerConfig(admin=AdminConfig(weight_folders=(str(tmp_path / "weights"),)))

    def folder(self, config: ServerConfig) -> Path:
        return Path(config.admin.weight_folders[0]) / "a"

    def test_without_one_the_configured_model_serves(self, config: ServerConfig) -> None:
        assert current_model(config) is config.model
        assert current_model(ServerConfig()) == ServerConfig().model
        write_pointer(ServerConfig(), Path("/"), "1-a")  # nowhere to note it

    def test_a_replica_that_starts_takes_what_was_published_under_the_same_name(self, config: ServerConfig) -> None:
        write_pointer(config, self.folder(config), make_manifest(self.folder(config), 1).version)
        model = current_model(config)
        assert (model.source, model.served_name) == (str(self.folder(config)), config.model.served_name)

    def test_a_server_of_another_model_does_not(self, config: ServerConfig) -> None:
        write_pointer(config, self.folder(config), make_manifest(self.folder(config), 1).version)
        other = ServerConfig(model=type(config.model)(source="/other"), admin=config.admin)
        assert current_model(other) is other.model

    def test_weights_that_are_gone_changed_or_elsewhere_are_not_taken(
        self, config: ServerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = pointer_file(config)
        assert file is not None
        version = make_manifest(self.folder(config), 1).version
        for path, noted in ((self.folder(config), "2-b"), (tmp_path / "weights/b", version), (tmp_path, version)):
            caplog.clear()
            write_pointer(config, path, noted)
            assert current_model(config) is config.model
            assert "the published weights cannot be used" in caplog.text
        file.write_text("{")
        assert current_model(config) is config.model
        file.parent.rename(tmp_path / "moved")
        write_pointer(config, self.folder(config), version)
        assert "will serve older weights" in caplog.text
