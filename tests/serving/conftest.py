"""One `serve run` of the real model for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from apt_serve.engine.client import Capability
from benchmarks.serve.launch import free_port
from tests.apt_serve.api.conftest import Endpoint

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
START_TIMEOUT_S = 240


def shipped_config(port: int, grpc_port: int | None = None, **model: object) -> dict[str, object]:
    """deploy/config.yaml on another port, with some settings of the model changed; with gRPC if it gets a port."""
    config = yaml.safe_load((ROOT / "deploy" / "config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    if grpc_port is not None:
        config["grpc_options"] = {"port": grpc_port, "grpc_servicer_functions": ["apt_serve.rpc.register.add_services"]}
    args = config["applications"][0]["args"]
    args["model"].update(model)
    args["api"].update(shutdown_grace_s=20.0)
    return dict(config)


def wait_ready(base_url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(f"{base_url}/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server was not ready in time")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # SIGINT is ignored by what a shell runs in the background
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def serve_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """`serve run` on a configuration like the shipped one: exact float32, so that answers can be compared."""
    folder = tmp_path_factory.mktemp("serve")
    port, grpc_port = free_port(), free_port()
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump(shipped_config(port, grpc_port, dtype="float32", num_threads=1, max_model_len=2048))
    )
    command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    base_url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(base_url, process)
        yield Endpoint(base_url, MODEL, frozenset(Capability), f"127.0.0.1:{grpc_port}")
    except AssertionError:
        print((folder / "log").read_text(errors="replace")[-4000:])
        raise
    finally:
        stop(process)
