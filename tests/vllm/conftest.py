"""APT over vLLM, as users start it. All of it needs an environment with vLLM: `make test-vllm`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from apt_serve.engine.client import Capability
from apt_serve.llm import LLM
from benchmarks.serve.launch import free_port
from tests.apt_serve.api.conftest import Endpoint
from tests.serving.conftest import MODEL, ROOT, shipped_config, stop, wait_ready

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

NUM_PLACES = 64
SETTINGS: dict[str, Any] = {
    "engine": "vllm",
    "dtype": "float32",
    "num_threads": min(2, os.cpu_count() or 1),
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "max_waiting_requests": NUM_PLACES - 8,
    "kv_cache_gib": 1.0,
    "vllm_args": {"enforce_eager": True},
}
START = {
    "uvicorn": ("apt-serve", "start", "--runner", "uvicorn", "--config"),
    "ray": ("serve", "run"),
}


@contextmanager
def running(folder: Path, runner: str, **settings: Any) -> Iterator[tuple[Endpoint, subprocess.Popen[bytes]]]:
    """A server over vLLM and its process."""
    port = free_port()
    config, log = folder / "config.yaml", folder / "log"
    config.write_text(yaml.safe_dump(shipped_config(port, **(SETTINGS | settings))))
    program, *arguments = START[runner]
    command = [str(Path(sys.executable).parent / program), *arguments, str(config)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "TORCHDYNAMO_DISABLE": "1",  # vLLM would compile parts of its sampler, whatever enforce_eager says
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    base_url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(base_url, process)
        yield Endpoint(base_url, MODEL, frozenset(Capability)), process
    except AssertionError:
        print(log.read_text(errors="replace")[-8000:])
        raise
    finally:
        if process.poll() is None:
            stop(process)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A server that all tests share: exact float32, so that answers can be compared."""
    with running(tmp_path_factory.mktemp("vllm"), "uvicorn") as (endpoint, _):
        yield endpoint


@pytest.fixture
def http(server: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def native() -> LLM:
    """The native engine on the same weights, in this process."""
    return LLM(MODEL, dtype="float32", max_model_len=2048, max_num_seqs=8)
