"""From a trained folder to a running server: `apt-train publish` against a real one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_core.errors import ConfigError
from apt_core.manifest import MANIFEST, UNPUBLISHED, read_manifest
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from apt_serve.server import Server
from apt_train.cli import USAGE_ERROR, main
from apt_train.errors.recovery import RecoverySettings
from apt_train.publish import PublishError, PublishSettings, publish
from apt_train.quantize import quantize
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.published import base_folder, reweigh
from tests.apt_train.quantize.tiny import settings as quantize_settings
from tests.apt_train.runs import write_config

TOKEN = "correct-horse-battery-staple"
QUICK = RecoverySettings(io_attempts=4, io_first_wait_s=0.01, io_longest_wait_s=0.05)
PROMPT = list(range(20, 50))
ENGINE: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 600, "max_num_seqs": 8, "num_threads": 1}


@dataclass
class Running:
    """A server, the folder it loads from, and the settings with which another would start."""

    url: str
    weights: Path
    config: ServerConfig

    def trained(self, step: int) -> Path:
        """A folder as a trainer leaves it."""
        folder = shutil.copytree(self.weights.parent / "base", self.weights / f"step-{step}")
        reweigh(folder, seed=step)
        return folder

    def complete(self) -> dict[str, Any]:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer: dict[str, Any] = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).json()
        return answer


@contextmanager
def running(config: ServerConfig) -> Iterator[str]:
    """The server of these settings, in this process."""
    server = Server(config)
    server.app.router.on_startup = [server.start]
    server.app.router.on_shutdown = [server.stop]
    with LiveServer(server.app) as live:
        yield live.base_url


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("APT_ADMIN_TOKEN", TOKEN)
    base_folder(tmp_path / "base")
    weights = tmp_path / "weights"
    weights.mkdir()
    config = ServerConfig(
        EngineConfig(source=str(tmp_path / "base"), name="tiny", **ENGINE),
        admin=AdminConfig(weight_folders=(str(weights),)),
    )
    with running(config) as url:
        yield Running(url, weights, config)


def handed_over(folder: Path, server: str, **settings: Any) -> str:
    given = {"step": 1, "recovery": QUICK, "timeout_s": 60.0} | settings
    return publish(PublishSettings(str(folder), server=server, **given), lambda line: None)


def greedy(folder: Path) -> list[int]:
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
    return LLM(str(folder), **ENGINE).generate([PROMPT], sampling)[0].token_ids


def test_a_published_step_is_what_the_server_then_runs_on(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert server.complete()["weight_version"] == UNPUBLISHED
    folder = server.trained(7)
    assert main(["publish", "--folder", str(folder), "--step", "7", "--server", server.url]) == 0
    version = read_manifest(folder).version
    answer = server.complete()
    assert answer["weight_version"] == version and version.startswith("7-")
    assert answer["choices"][0]["token_ids"] == greedy(folder)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{folder} holds version {version}"
    assert last.startswith("done after ") and last.endswith(f"(serves {version})")


def test_a_quantized_folder_is_published_as_it_is(server: Running, tmp_path: Path) -> None:
    output = server.weights / "step-2-w4a16"
    quantize(str(tmp_path / "base"), str(output), quantize_settings(tmp_path, scheme="w4a16", group_size=32))
    version = handed_over(output, server.url, step=2)
    assert server.complete()["weight_version"] == version
    assert server.complete()["choices"][0]["token_ids"] == greedy(output)


def test_a_run_hands_over_what_it_has_trained(server: Running, tmp_path: Path) -> None:
    flags = {"model.source": tmp_path / "base", "publish.server": server.url, "publish.folder": server.weights}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["run", write_config(tmp_path, 2), *arguments]) == 0
    answer = server.complete()
    assert answer["weight_version"].startswith("2-")
    assert answer["choices"][0]["token_ids"] == greedy(tmp_path / "run/model")


def test_a_run_that_could_not_hand_over_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("APT_ADMIN_TOKEN", raising=False)
    flags = ["--publish.server", "http://127.0.0.1:9"]
    assert main(["run", write_config(tmp_path, 2), *flags]) == USAGE_ERROR
    assert "APT_ADMIN_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_replica_that_starts_later_begins_with_what_was_published_last(server: Running) -> None:
    for step in (1, 2):
        version = handed_over(server.trained(step), server.url, step=step)
    with running(server.config) as url:
        card = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (card["id"], card["weight_version"]) == ("tiny", version)


def test_a_replica_that_was_loading_meanwhile_catches_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    version = handed_over(server.trained(1), server.url)
    monkeypatch.setattr("apt_serve.server.current_model", lambda config: config.model)  # read before it was written
    with running(server.config) as url:
        wait_until(lambda: httpx.get(f"{url}/v1/models").json()["data"][0]["weight_version"] == version, timeout_s=60)


def test_what_the_server_refuses_is_said_and_the_old_weights_serve(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = server.trained(3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0}})
    )
    assert main(["publish", "--folder", str(folder), "--step", "3", "--server", server.url]) == 1
    error = capsys.readouterr().err
    assert f"{UNPUBLISHED} goes on serving: rope is" in error
    assert server.complete()["weight_version"] == UNPUBLISHED


def test_weights_that_compute_something_else_than_at_the_trainer_are_refused(server: Running) -> None:
    folder = server.trained(4)
    publish(PublishSettings(str(folder), step=4), lambda line: None)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["probe"]["logprobs"] = [value - 3 for value in manifest["probe"]["logprobs"]]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    httpx.post(f"{server.url}/admin/weights", json={"path": str(folder)}, headers=headers).raise_for_status()

    def swap() -> Any:
        return httpx.get(f"{server.url}/admin/weights", headers=headers).json()["replicas"][0]["swap"]

    wait_until(lambda: swap()["phase"] == "failed", timeout_s=60)
    assert "differ from the trainer's by 3 nats" in swap()["error"]


@pytest.mark.parametrize(
    ("settings", "token", "message"),
    [
        ({}, "another-token-altogether", "answers 401: This needs the admin token"),
        ({"path_on_server": "/elsewhere"}, TOKEN, "answers 403: path: lies outside"),
        ({"path_on_server": "{weights}/absent"}, TOKEN, "answers 400: path: there is no folder with a manifest"),
    ],
)
def test_a_refusal_of_the_servers_is_an_error_with_its_words(
    server: Running, monkeypatch: pytest.MonkeyPatch, settings: Any, token: str, message: str
) -> None:
    monkeypatch.setenv("APT_ADMIN_TOKEN", token)
    settings = {name: value.format(weights=server.weights) for name, value in settings.items()}
    with pytest.raises(PublishError, match=message):
        handed_over(server.trained(5), server.url, **settings)


def test_a_folder_that_changes_after_its_manifest_is_noticed(server: Running) -> None:
    folder = server.trained(6)
    publish(PublishSettings(str(folder), step=6), lambda line: None)
    reweigh(folder, seed=60)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    httpx.post(f"{server.url}/admin/weights", json={"path": str(folder)}, headers=headers).raise_for_status()

    def swap() -> Any:
        return httpx.get(f"{server.url}/admin/weights", headers=headers).json()["replicas"][0]["swap"]

    wait_until(lambda: swap()["phase"] == "failed", timeout_s=60)
    assert "SHA-256 differs" in swap()["error"]


class Script(BaseHTTPRequestHandler):
    """Answers with what a test has prepared, one after the other, the last for ever."""

    answers: list[tuple[int, Any]]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def scripted(*answers: tuple[int, Any]) -> Iterator[str]:
    handler = type("Handler", (Script,), {"answers": list(answers)})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class TestPatience:
    """What a server may do while it is waited for."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("APT_ADMIN_TOKEN", TOKEN)
        monkeypatch.setattr("apt_train.publish.POLL_S", 0.01)
        return base_folder(tmp_path / "base")

    def replica(self, folder: Path, phase: str, serves: str = "0-old") -> dict[str, Any]:
        swap = {"phase": phase, "path": str(folder), "seconds": 1.0, "ended_generations": 2, "error": "too wide"}
        return {"weight_version": serves, "swap": swap}

    def error(self, code: str) -> dict[str, Any]:
        return {"error": {"message": "not now", "code": code}}

    def test_a_busy_server_is_asked_again_and_waited_for_until_all_replicas_have_done(self, folder: Path) -> None:
        version = publish(PublishSettings(str(folder), step=1), lambda line: None)
        done, loading = self.replica(folder, "done", version), self.replica(folder, "loading")
        restarted = {"weight_version": version, "swap": None}
        lines: list[str] = []
        with scripted(
            (503, self.error("engine_stopped")),
            (409, self.error("swap_running")),
            (202, {"replicas": [loading, loading]}),
            (200, {"replicas": [done, loading]}),
            (502, "a proxy's"),
            (200, {"replicas": [done, self.replica(folder, "draining", version)]}),
            (200, {"replicas": [done, restarted]}),
        ) as url:
            publish(PublishSettings(str(folder), server=url, recovery=QUICK), lines.append)
        assert lines[-1] == f"done after 1.0 s, 2 generations ended (serves {version}), idle (serves {version})"

    def test_one_replica_that_refuses_is_a_failure(self, folder: Path) -> None:
        replicas = [self.replica(folder, "loading"), self.replica(folder, "failed")]
        with (
            scripted((202, {"replicas": replicas})) as url,
            pytest.raises(PublishError, match="was refused, 0-old goes on serving: too wide"),
        ):
            handed_over(folder, url)

    def test_no_outcome_in_time_is_a_failure(self, folder: Path) -> None:
        with (
            scripted((202, {"replicas": [self.replica(folder, "loading")]})) as url,
            pytest.raises(PublishError, match=r"no outcome after 0\.1 s: loading \(serves 0-old\)"),
        ):
            handed_over(folder, url, timeout_s=0.1)

    def test_an_engine_that_cannot_is_not_asked_again(self, folder: Path) -> None:
        with (
            scripted((409, self.error("swap_unsupported")), (202, {})) as url,
            pytest.raises(PublishError, match="answers 409: not now"),
        ):
            handed_over(folder, url)

    def test_a_server_that_stays_away_is_an_error(self, folder: Path) -> None:
        with scripted((200, {})) as url:
            pass
        with pytest.raises(PublishError, match=r"/admin/weights cannot be reached: .*refused"):
            handed_over(folder, url)

    def test_something_else_that_answers_is_an_error(self, folder: Path) -> None:
        with scripted((404, "what?")) as url, pytest.raises(PublishError, match='answers 404: "what'):
            handed_over(folder, url)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"swap_timeout_s": -1.0}, "swap_timeout_s"),
        ({"step": -1}, "step"),
        ({"server": "127.0.0.1:8000"}, "server"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PublishSettings("folder", **settings)
    assert caught.value.field == field


def test_a_token_and_a_step_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APT_ADMIN_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="APT_ADMIN_TOKEN: must hold the server's admin token"):
        handed_over(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"step: .* has no manifest yet"):
        publish(PublishSettings(str(tmp_path)), lambda line: None)
    assert main(["publish", "--folder", str(tmp_path)]) == 2
    assert main(["publish", "--folder", str(tmp_path), "--step", "1"]) == 1  # no checkpoint
