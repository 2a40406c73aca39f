"""What Serve is told, and a real server on a Ray cluster of its own."""

from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from apt_core.config import parse, settings
from apt_core.errors import ConfigError
from apt_serve.config import ApiConfig, ServerConfig
from apt_serve.config_file import NO_GRPC, ConfigFile, HttpOptions, default_config_file, read_config_file
from apt_serve.engine.config import EngineConfig
from apt_serve.rpc.inference_pb2 import CancelRequest, GenerateRequest, Sampling
from apt_serve.rpc.inference_pb2_grpc import InferenceStub
from apt_train.publish import PublishSettings, publish
from tests.apt_serve.published import base_folder, publish_copy

CONFIG_FILE = Path(__file__).parents[2] / "deploy" / "config.yaml"

Start = Callable[[int, Path], AbstractContextManager[subprocess.Popen[str]]]
"""Starts the server on a port, with a folder for its files."""


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        is_section = isinstance(value, dict) and value  # an empty one is the default of a setting
        leaves |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
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
    assert file.grpc_options == default_config_file().grpc_options == NO_GRPC
    assert file.proxy_location == default_config_file().proxy_location


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: []", "applications: must hold exactly one, got 0"),
        ("applications: [{import_path: 'a:b'}]", "applications.0.import_path: must be 'apt_serve.deployment:build'"),
        ("applications: [{}]\nhttp_option: {}", "http_option: unknown setting; did you mean http_options?"),
        ("applications: [{}]\nhttp_options: {port: 0}", "http_options.port: must be between 1 and 65535, got 0"),
        ("applications: [{}]\ngrpc_options: {port: 0}", "grpc_options.port: must be between 1 and 65535, got 0"),
        (
            "applications: [{}]\ngrpc_options: {grpc_servicer_functions: [a.b]}",
            "grpc_options.grpc_servicer_functions.0: must be 'apt_serve.rpc.register.add_services'",
        ),
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

    def test_a_replica_whose_ranks_share_a_model_asks_for_a_gpu_each(self, deployment: Any) -> None:
        config = ServerConfig(EngineConfig(device="cuda", tensor_parallel_size=4))
        assert self.options(deployment, config).ray_actor_options["num_gpus"] == 4

    @pytest.mark.parametrize(("executor", "num_gpus"), [(None, 6), ("ray", 0)])
    def test_a_replica_whose_model_is_split_asks_for_all_of_its_gpus(
        self, deployment: Any, executor: str | None, num_gpus: int
    ) -> None:
        """Unless its engine asks Ray for them by itself, as it does across nodes."""
        model = EngineConfig(
            engine="vllm",
            device="cuda",
            tensor_parallel_size=2,
            pipeline_parallel_size=3,
            vllm_args={"distributed_executor_backend": executor} if executor else {},
        )
        assert self.options(deployment, ServerConfig(model)).ray_actor_options["num_gpus"] == num_gpus


class FakeServer:
    """Stands where a replica keeps its server."""

    def __init__(self, problem: str | None) -> None:
        self.found = problem
        self.num_stops = 0

    def problem(self) -> str | None:
        return self.found

    async def stop(self) -> None:
        self.num_stops += 1


class TestReplica:
    """What Serve calls in a replica."""

    def replica(self, server: FakeServer | None) -> Any:
        replica = pytest.importorskip("apt_serve.deployment").Replica(ServerConfig())
        replica._server = server
        return replica

    async def test_a_replica_with_a_problem_is_unhealthy(self) -> None:
        with pytest.raises(RuntimeError, match="the engine is dead"):
            await self.replica(FakeServer("the engine is dead")).check_health()

    async def test_a_replica_without_one_is_healthy(self) -> None:
        await self.replica(FakeServer(None)).check_health()
        await self.replica(None).check_health()

    async def test_draining_stops_the_server_if_there_is_one(self) -> None:
        server = FakeServer(None)
        await self.replica(server).drain()
        await self.replica(None).drain()
        assert server.num_stops == 1


def test_the_last_line_of_a_traceback_is_what_went_wrong() -> None:
    last_line = pytest.importorskip("apt_serve.deployment")._last_line
    assert last_line("Traceback:\n  File\n  CheckpointError: a.gguf: broken \n\n") == "CheckpointError: a.gguf: broken"
    assert last_line("") == ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command of this environment's, and its end."""
    full = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    process = subprocess.Popen(
        full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)


def apt_serve_start(port: int, folder: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    flags = (f"--port={port}", "--model.max_model_len=512", "--api.shutdown_grace_s=120")
    return started("python", "-m", "apt_serve", "start", *flags)


def serve_run(port: int, folder: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Ray's own command on the shipped configuration."""
    config = yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    args = config["applications"][0]["args"]
    args["model"]["max_model_len"], args["api"]["shutdown_grace_s"] = 512, 120.0
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    hook = "apt_serve.deployment.drain_at_signals"
    return started("serve", "run", str(folder / "config.yaml"), RAY_RUNTIME_ENV_HOOK=hook)


def stream(url: str, lines: list[str]) -> None:
    body = {"messages": [{"role": "user", "content": "Tell a story."}], "stream": True, "max_tokens": 400}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"ignore_eos": True}, timeout=120) as response:
        lines.extend(line for line in response.iter_lines() if line)


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError("the server was not ready in time")


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("start", [apt_serve_start, serve_run])
def test_on_sigterm_running_streams_finish_and_new_requests_are_refused(start: Start, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with start(port, tmp_path) as process:
        assert process.stdout
        if start is apt_serve_start:
            greeting = next(line for line in process.stdout if "APT serves" in line)
            assert f"APT serves smollm2-135m-instruct at {url} " in greeting
        wait_ready(url, process)
        lines: list[str] = []
        reader = threading.Thread(target=stream, args=(url, lines))
        reader.start()
        deadline = time.monotonic() + 60
        while 'num_requests_running{model_name="smollm2-135m-instruct"} 1.0' not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready").status_code != 503:
            assert time.monotonic() < deadline
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert "Retry-After" in refused.headers
        output = process.stdout.read()
        reader.join()
        assert process.wait(60) == 0, output
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_model_that_cannot_be_loaded_is_named_in_the_last_line() -> None:
    with started("python", "-m", "apt_serve", "start", "/absent", f"--port={free_port()}") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    *_, last = output.strip().splitlines()
    assert last.startswith("apt-serve: the server did not start: ")
    assert "/absent: there is no such folder" in last


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_published_weights_reach_every_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_ADMIN_TOKEN", "correct-horse-battery-staple")
    base = base_folder(tmp_path / "base")
    manifest = publish_copy(base, tmp_path / "weights" / "step-1", step=1)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ("--replicas=2", f"--port={port}", f"--admin.weight_folders={tmp_path / 'weights'}")
    model = ("--model.dtype=float32", "--model.num_kv_blocks=600", "--model.num_threads=1")
    with started("python", "-m", "apt_serve", "start", str(base), *flags, *model) as process:
        wait_ready(url, process)
        authorization = {"Authorization": "Bearer correct-horse-battery-staple"}
        deadline = time.monotonic() + 120
        while len(httpx.get(f"{url}/admin/weights", headers=authorization).json()["replicas"]) < 2:
            assert time.monotonic() < deadline, "the second replica does not start"
            time.sleep(0.2)
        settings = PublishSettings(str(tmp_path / "weights" / "step-1"), server=url, timeout_s=120.0)
        lines: list[str] = []
        assert publish(settings, lines.append) == manifest.version
        replicas = httpx.get(f"{url}/admin/weights", headers=authorization).json()["replicas"]
        assert [replica["weight_version"] for replica in replicas] == [manifest.version] * 2
        assert lines[-1].count("done after") == 2
        answers = [httpx.post(f"{url}/v1/completions", json={"prompt": [5, 6], "max_tokens": 1}) for _ in range(8)]
        assert {answer.json()["weight_version"] for answer in answers} == {manifest.version}


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_cancel_reaches_the_replica_that_generates(tmp_path: Path) -> None:
    """Each Cancel comes to any of them."""
    port, grpc_port = free_port(), free_port()
    config = yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    config["grpc_options"] = {"port": grpc_port, "grpc_servicer_functions": ["apt_serve.rpc.register.add_services"]}
    args = config["applications"][0]["args"]
    args["replicas"] = 2
    args["model"] |= {"dtype": "float32", "max_model_len": 1024, "num_kv_blocks": 600, "num_threads": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    hook = "apt_serve.deployment.drain_at_signals"
    with started("serve", "run", str(tmp_path / "config.yaml"), RAY_RUNTIME_ENV_HOOK=hook) as process:
        wait_ready(f"http://127.0.0.1:{port}", process)
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            stub = InferenceStub(channel)
            sampling = Sampling(max_tokens=900, temperature=0, ignore_eos=True)
            for number in range(8):
                name = f"story-{number}"
                call = stub.GenerateStream(GenerateRequest(text="Once", sampling=sampling, request_id=name))
                next(call)
                stub.Cancel(CancelRequest(request_id=name))
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
                assert caught.value.code() == grpc.StatusCode.CANCELLED


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_models_are_loaded_and_unloaded_on_every_replica(tmp_path: Path) -> None:
    small = {"num_kv_blocks": 600, "dtype": "float32"}
    config = yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8"))
    port = config["http_options"]["port"] = free_port()
    args = config["applications"][0]["args"]
    args |= {"replicas": 2, "admin": {"token": "correct-horse-battery-staple"}}
    args["model"] |= small | {"source": str(base_folder(tmp_path / "a")), "num_threads": 1}
    args["models"]["others"] = {"b": small | {"source": str(base_folder(tmp_path / "b"))}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": "Bearer correct-horse-battery-staple"}

    def states(name: str) -> list[str]:
        replicas = httpx.get(f"{url}/admin/models", headers=headers, timeout=30).json()["replicas"]
        return [model["state"] for replica in replicas for model in replica["models"] if model["name"] == name]

    def wait_for(expected: list[str]) -> None:
        deadline = time.monotonic() + 120
        while states("b") != expected:
            assert time.monotonic() < deadline, states("b")
            time.sleep(0.2)

    with started("python", "-m", "apt_serve", "start", "--config", str(tmp_path / "config.yaml")) as process:
        wait_ready(url, process)
        wait_for(["not_loaded"] * 2)
        assert httpx.post(f"{url}/admin/models/b/load", headers=headers, timeout=60).status_code == 202
        wait_for(["loaded"] * 2)
        answers = [
            httpx.post(f"{url}/v1/completions", json={"model": "b", "prompt": [5, 6], "max_tokens": 1}, timeout=60)
            for _ in range(8)
        ]
        assert {(answer.status_code, answer.json()["model"]) for answer in answers} == {(200, "b")}
        answer = httpx.post(f"{url}/admin/models/b/unload", headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert states("b") == ["not_loaded"] * 2
        assert states("a") == ["loaded"] * 2
