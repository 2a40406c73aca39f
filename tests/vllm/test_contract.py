"""The contract of the API holds over vLLM, under uvicorn and under `serve run`."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from tests.apt_serve.api.conftest import Endpoint
from tests.serving.contract import CONTRACT, check_contract
from tests.vllm.conftest import running

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract_of_the_api_holds(server: Endpoint, file: str) -> None:
    check_contract(server.base_url, file)


@pytest.fixture(scope="module")
def serve_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The same under `serve run`."""
    with running(tmp_path_factory.mktemp("ray"), "ray") as (endpoint, _):
        yield endpoint


@pytest.mark.ray
@pytest.mark.parametrize("file", CONTRACT)
def test_the_contract_holds_under_serve_run(serve_run: Endpoint, file: str) -> None:
    check_contract(serve_run.base_url, file)


@pytest.mark.ray
def test_serve_run_answers_as_the_native_engine_does(serve_run: Endpoint, native: LLM) -> None:
    prompt = "The capital of France is"
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{serve_run.base_url}/v1/completions", json=body, timeout=120).json()
    assert httpx.get(f"{serve_run.base_url}/health", timeout=30).status_code == 200
    expected = native.generate(prompt, SamplingParams(max_tokens=12, temperature=0))[0].text
    assert answer["choices"][0]["text"] == expected
