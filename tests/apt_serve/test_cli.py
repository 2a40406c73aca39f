from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apt_core.config import settings
from apt_serve import cli
from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions
from apt_serve.engine.config import EngineConfig

CONFIG_FILE = Path(__file__).parents[2] / "deploy" / "config.yaml"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[ServerConfig, HttpOptions, GrpcOptions]]]:
    """What the uvicorn runner was asked to run."""
    from apt_serve import standalone

    calls: list[tuple[ServerConfig, HttpOptions, GrpcOptions]] = []

    def run(config: ServerConfig, http: HttpOptions, on_ready: Callable[[], None], grpc: GrpcOptions) -> None:
        calls.append((config, http, grpc))

    monkeypatch.setattr(standalone, "run", run)
    yield calls


def start(*argv: str) -> int:
    return cli.main(["start", "--runner", "uvicorn", *argv])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("apt-serve: ")


def test_start_without_anything_takes_the_defaults(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "require_free_port", lambda http, grpc: None)
    assert start() == 0
    assert started == [(ServerConfig(), HttpOptions(), NO_GRPC)]


def test_flags_go_before_the_file_and_the_file_before_defaults(started: Any, tmp_path: Path, free_port: int) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"http_options: {{port: {free_port}}}\n"
        "applications: [{args: {replicas: 2, model: {max_num_seqs: 8, block_size: 32}}}]\n"
    )
    assert start("some/model", "--config", str(path), "--model.max_num_seqs=4", "--host", "localhost") == 0
    config, http, grpc = started[0]
    assert config == ServerConfig(EngineConfig(source="some/model", max_num_seqs=4, block_size=32), replicas=2)
    assert http == HttpOptions("localhost", free_port)
    assert not grpc.is_on


def test_a_port_for_grpc_turns_it_on(started: Any, tmp_path: Path, free_port: int) -> None:
    path = tmp_path / "config.yaml"
    functions = "grpc_servicer_functions: [apt_serve.rpc.register.add_services]"
    path.write_text(f"grpc_options: {{port: {free_port}, {functions}}}\napplications: [{{}}]\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        http_port = probe.getsockname()[1]
    port = f"--port={http_port}"
    assert start(port, "--grpc-port", str(free_port)) == start(port, "--config", str(path)) == 0
    assert [grpc for _, _, grpc in started] == [GrpcOptions().at(free_port)] * 2
    assert started[0][2].is_on


def test_start_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["start", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert not [setting.name for setting in settings(ServerConfig) if f"--{setting.name}" not in text]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.max_num_seqs=many"], 'model.max_num_seqs: must be a valid integer, got "many"'),
        (["--model.max_num_seq=8"], "model.max_num_seq: unknown setting; did you mean model.max_num_seqs?"),
        (["--model.max_num_seqs=0"], "model.max_num_seqs: must be above 0, got 0"),
        (["--api.shutdown_grace_s=-1"], "api.shutdown_grace_s: must be above 0, got -1.0"),
        (["--port=99999"], "port: must be between 1 and 65535, got 99999"),
        (["--config=absent.yaml"], "absent.yaml: cannot be read: No such file or directory"),
    ],
)
def test_bad_settings_end_with_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert refusal(capsys, "start", *argv) == message


def test_a_bad_setting_in_a_file_names_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications: [{args: {model: {max_num_seq: 1}}}]")
    expected = f"{path}: model.max_num_seq: unknown setting; did you mean max_num_seqs?"
    assert refusal(capsys, "start", "--config", str(path)) == expected


def test_a_port_in_use_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(capsys, "start", f"--port={port}") == (
            f"port: cannot listen on 127.0.0.1:{port}: Address already in use"
        )


def test_a_port_for_grpc_that_cannot_be_had_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], free_port: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(capsys, "start", "--runner", "uvicorn", f"--port={free_port}", f"--grpc-port={port}") == (
            f"grpc_port: cannot listen on 127.0.0.1:{port}: Address already in use"
        )
    both = refusal(capsys, "start", "--runner", "uvicorn", f"--port={free_port}", f"--grpc-port={free_port}")
    assert both == f"grpc_port: must be another than HTTP's, got {free_port}"


def test_grpc_on_ray_is_not_opened_to_all_addresses_unasked(capsys: pytest.CaptureFixture[str], free_port: int) -> None:
    assert refusal(capsys, "start", f"--grpc-port={free_port}").startswith(
        "grpc_port: Ray Serve listens for gRPC on all addresses"
    )


def test_unknown_arguments_end_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["start", "--colour"])
    assert end.value.code == 2
    assert "unknown arguments: --colour" in capsys.readouterr().err


def test_the_greeting_is_a_command_that_a_shell_understands() -> None:
    text = cli.greeting(ServerConfig(EngineConfig(name="a model's")), HttpOptions(port=8123), 1.25)
    assert "http://127.0.0.1:8123 (1.2 s after start)" in text
    command = re.search(r"  (curl .*?)\n\n", text, flags=re.DOTALL)
    assert command
    words = shlex.split(command[1])
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8123/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "a model's"


def test_generate_refuses_bad_parameters_before_it_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "generate", "hi", "--temperature=3") == "temperature must be between 0 and 2, got 3.0"
    assert refusal(capsys, "generate", "hi", "--model.polcy=x").startswith("model.polcy: unknown setting")


def test_generate_names_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "hi", "--model.source=/absent"]) != 0
    assert capsys.readouterr().err.startswith("apt-serve: /absent: ")


@pytest.mark.parametrize(
    "argv", [["What is the capital of France?"], ["The capital of France is", "--raw"], ["Hi", "--system", "Be brief."]]
)
def test_generate_streams_to_the_terminal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(["generate", *argv, "--max-tokens=8", "--temperature=0", "--model.max_model_len=256"]) == 0
    captured = capsys.readouterr()
    if "--system" not in argv:
        assert "Paris" in captured.out
    assert re.search(r"\[\d+ prompt tokens, first token after [\d.]+ s, \d+ tokens at [\d.]+/s\]", captured.err)


@pytest.fixture
def benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks: two that run, two files that are a library."""
    folder = tmp_path / "benchmarks"
    main = 'import sys\nif __name__ == "__main__":\n    sys.exit(len(sys.argv))\n'
    for name in ("__init__.py", "machine.py", "engine/__init__.py", "engine/__main__.py", "serve/startup.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(main if name in ("engine/__main__.py", "serve/startup.py") else "")
    monkeypatch.setattr(cli, "BENCHMARKS", folder)
    return folder


@pytest.mark.parametrize("name", ["engine", "serve/startup"])
def test_bench_runs_a_script_with_its_arguments(benchmarks: Path, name: str) -> None:
    assert cli.main(["bench", name, "--one", "two"]) == 3


@pytest.mark.parametrize(("argv", "code"), [([], 0), (["serve"], 2), (["machine"], 2)])
def test_bench_lists_what_there_is(
    benchmarks: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int
) -> None:
    assert cli.main(["bench", *argv]) == code
    assert re.findall(r"apt-serve bench (\S+)", capsys.readouterr().out) == ["engine", "serve/startup"]


def test_bench_needs_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "BENCHMARKS", tmp_path / "absent")
    assert "benchmarks come with the source" in refusal(capsys, "bench", "serve")


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "apt_serve", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: apt-serve")
