"""Several models in one server, over HTTP and WebSocket, on real engines of tiny random models."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from apt_core.errors import ConfigError
from apt_serve.access.config import AccessConfig
from apt_serve.access.identity import LOCAL
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.state import ApiState
from apt_serve.config import ServerConfig
from apt_serve.engine.client import EngineStoppedError, GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.factory import make_engine
from apt_serve.engine.model_runner import ModelRunner
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.step import StepInput
from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.api.several_models import ADMIN, NAMES, PROMPT, Served, TinyModels, serve

LONG = {"max_tokens": 1000, "ignore_eos": True}
"""With slow steps, some seconds."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels.make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config(tiny: TinyModels, tmp_path: Path) -> ServerConfig:
    return tiny.server_config(tmp_path)


@pytest.fixture
def narrow(tiny: TinyModels, tmp_path: Path) -> ServerConfig:
    """Room for the default model and one more."""
    return tiny.server_config(tmp_path, max_loaded=2, wait_s=60.0)


@pytest.fixture
def served(config: ServerConfig) -> Iterator[Served]:
    with serve(config) as served:
        yield served


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams last long enough for a test to act meanwhile."""
    launch = ModelRunner.launch

    def launch_slowly(self: ModelRunner, step: StepInput) -> Any:
        time.sleep(0.003)
        return launch(self, step)

    monkeypatch.setattr(ModelRunner, "launch", launch_slowly)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_the_field_model_chooses_who_answers(served: Served, tiny: TinyModels) -> None:
    assert served.text(None) == tiny.answers["a"]
    for name in NAMES:
        response = served.complete(name)
        assert response.json()["choices"][0]["text"] == tiny.answers[name]
        assert response.json()["model"] == name


def test_nothing_but_the_default_is_loaded_before_it_is_asked_for(served: Served) -> None:
    assert served.loaded() == {"a"}
    served.text("b")
    assert served.loaded() == {"a", "b"}
    assert served.states()["b"]["memory_bytes"] > 0


def test_every_endpoint_knows_every_model(served: Served, tiny: TinyModels) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    answers = {name: served.http.post("/v1/chat/completions", json=chat | {"model": name}) for name in NAMES}
    assert {name: answer.json()["model"] for name, answer in answers.items()} == {name: name for name in NAMES}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers.values()}) == len(NAMES)
    simple = {"text": PROMPT, "max_length": 12, "temperature": 0}
    for name in NAMES:
        answer = served.http.post("/generate", json=simple | {"model": name}).json()
        assert answer["generated_text"] == tiny.answers[name]
        tokens = served.http.post("/tokenize", json={"model": name, "prompt": PROMPT}).json()["tokens"]
        text = served.http.post("/detokenize", json={"model": name, "tokens": tokens}).json()["prompt"]
        assert text.removeprefix("<|im_start|>") == PROMPT


def test_a_stream_comes_from_the_model_that_was_asked_for(served: Served, tiny: TinyModels) -> None:
    lines = served.complete("b", stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == tiny.answers["b"]
    assert {chunk["model"] for chunk in chunks} == {"b"}
    assert lines[-2] == "data: [DONE]"


def test_models_have_fingerprints_of_their_own(served: Served) -> None:
    assert len({served.complete(name).json()["system_fingerprint"] for name in NAMES}) == len(NAMES)


def test_all_models_are_listed_loaded_or_not(served: Served) -> None:
    served.text("b")
    cards = served.http.get("/v1/models").json()["data"]
    assert [(card["id"], card["loaded"]) for card in cards] == [("a", True), ("b", True), ("c", False)]
    assert [card["max_model_len"] for card in cards] == [4096, 4096, None]
    assert served.http.get("/v1/models/c").json() == cards[2]
    summaries = served.http.get("/models").json()["models"]
    assert [(each["name"], each["loaded"], each["vocab_size"]) for each in summaries] == [
        ("a", True, 512),
        ("b", True, 512),
        ("c", False, None),
    ]
    assert served.loaded() == {"a", "b"}  # a look at the list loads nothing


def test_an_unknown_model_is_not_found(served: Served) -> None:
    assert error_of(served.complete("x")) == (404, "model_not_found", "model")
    assert error_of(served.http.get("/v1/models/x")) == (404, "model_not_found", "model")


def test_a_request_that_its_model_refuses_lets_it_go(served: Served) -> None:
    response = served.complete("b", max_tokens=100_000)
    assert error_of(response)[:2] == (400, "context_length_exceeded")
    assert error_of(served.complete("b", prompt=[99_999]))[0] == 400
    served.wait_idle()
    assert served.metric("requests_rejected_total", model_name="b", reason="context_length_exceeded") == 1


def test_websocket_messages_choose_their_models_beside_each_other(served: Served, tiny: TinyModels) -> None:
    url = str(served.http.base_url).replace("http", "ws", 1).rstrip("/") + "/ws/generate"
    texts = dict.fromkeys(NAMES, "")
    with connect(url) as socket:
        for name in (*NAMES, "x"):
            message = {"type": "generate", "id": name, "model": name, "prompt": PROMPT, "max_tokens": 12}
            socket.send(json.dumps(message | {"temperature": 0}))
        running = {*NAMES, "x"}
        while running:
            message = json.loads(socket.recv(timeout=60))
            if message["type"] == "tokens":
                texts[message["id"]] += message["text"]
            if message["type"] == "error":
                assert (message["id"], message["error"]["code"]) == ("x", "model_not_found")
            if message["type"] in ("finish", "error"):
                running.discard(message["id"])
        served.wait_idle()
    assert texts == tiny.answers


@pytest.mark.usefixtures("slow_steps")
def test_a_websocket_that_closes_lets_its_models_go(served: Served) -> None:
    url = str(served.http.base_url).replace("http", "ws", 1).rstrip("/") + "/ws/generate"
    with connect(url) as socket:
        socket.send(json.dumps({"type": "generate", "id": "1", "model": "b", "prompt": PROMPT} | LONG))
        assert json.loads(socket.recv(timeout=60))["type"] == "start"
        assert served.states()["b"]["requests"] == 1
    served.wait_idle()


def test_twenty_clients_share_two_places_among_three_models(narrow: ServerConfig, tiny: TinyModels) -> None:
    with serve(narrow) as served:

        def client(number: int) -> None:
            for turn in range(4):
                name = NAMES[(number + turn) % len(NAMES)]
                assert served.text(name) == tiny.answers[name]

        with ThreadPoolExecutor(20) as pool:
            for done in [pool.submit(client, number) for number in range(20)]:
                done.result()
        served.wait_idle()
        assert len(served.loaded()) <= 2
        assert served.metric("model_evictions_total", model_name="b")


@pytest.mark.usefixtures("slow_steps")
def test_a_model_that_streams_is_not_evicted(narrow: ServerConfig, tiny: TinyModels) -> None:
    narrow = replace(narrow, models=replace(narrow.models, wait_s=0.5))
    with serve(narrow) as served:
        with served.http.stream("POST", "/v1/completions", json=_long("b")) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = served.complete("c")
            assert error_of(refused) == (503, "model_busy", "model")
            assert int(refused.headers["Retry-After"]) >= 1
            assert served.text("a") == tiny.answers["a"]
            assert [line for line in lines if line][-1] == "data: [DONE]"
        served.wait_idle()
        wait_until(lambda: served.complete("c").status_code == 200)  # a load may take longer than a request waits here
        assert served.text("c") == tiny.answers["c"]
        assert served.loaded() == {"a", "c"}


@pytest.mark.usefixtures("slow_steps")
def test_who_waits_for_a_stream_of_another_model_gets_its_turn(narrow: ServerConfig, tiny: TinyModels) -> None:
    with serve(narrow) as served, ThreadPoolExecutor(1) as pool:
        with served.http.stream("POST", "/v1/completions", json=_long("b")) as stream:
            lines = stream.iter_lines()
            next(lines)
            waiting = pool.submit(served.text, "c")
            wait_until(lambda: served.states()["c"]["waiting"] == 1)
            assert not waiting.done()
        assert waiting.result() == tiny.answers["c"]  # the stream's client has left


@pytest.mark.usefixtures("slow_steps")
def test_clients_that_leave_give_their_models_back(served: Served) -> None:
    for _ in range(3):
        with served.http.stream("POST", "/v1/completions", json=_long("b")) as stream:
            lines = stream.iter_lines()
            next(lines)
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/v1/completions", json=_long("c") | {"stream": False}, timeout=0.3)
    served.wait_idle()
    wait_until(lambda: served.metric("num_requests_running", model_name="b") == 0)


def test_a_client_that_leaves_during_the_load_is_not_waited_for(config: ServerConfig, tiny: TinyModels) -> None:
    with serve(config, is_slow=True) as served:
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/v1/completions", json={"model": "b", "prompt": PROMPT}, timeout=0.3)
        served.wait_idle()
        wait_until(lambda: served.loaded() == {"a", "b"})  # the load went on
        assert served.text("b") == tiny.answers["b"]
        assert served.metric("model_loads_total", model_name="b", outcome="done") == 1


def test_requests_that_come_during_a_load_share_it(config: ServerConfig, tiny: TinyModels) -> None:
    with serve(config, is_slow=True) as served, ThreadPoolExecutor(8) as pool:
        assert set(pool.map(served.text, ["b"] * 8)) == {tiny.answers["b"]}
        assert served.metric("model_loads_total", model_name="b", outcome="done") == 1


def test_a_model_that_does_not_load_is_named_and_tried_again(
    config: ServerConfig, tiny: TinyModels, tmp_path: Path
) -> None:
    source = tmp_path / "to-come"
    others = config.models.others | {"broken": EngineConfig(str(source))}
    config = replace(config, models=replace(config.models, others=others))
    with serve(config) as served:
        response = served.complete("broken")
        assert error_of(response) == (503, "model_load_failed", "model")
        assert response.json()["error"]["message"] == "The model 'broken' could not be loaded."
        assert str(source) in served.states()["broken"]["error"]
        assert served.metric("model_loads_total", model_name="broken", outcome="failed") == 1
        assert served.text("b") == tiny.answers["b"]
        source.symlink_to(tiny.configs["c"].source)
        assert served.text("broken") == tiny.answers["c"]
        assert served.states()["broken"]["error"] is None


def test_a_model_that_is_too_large_says_so(config: ServerConfig, tiny: TinyModels) -> None:
    with serve(replace(config, models=replace(config.models, memory_gib=0.001))) as served:
        response = served.complete("b")
        assert error_of(response) == (503, "model_load_failed", "model")
        assert "models.memory_gib leaves 0.00: lower its max_num_seqs" in response.json()["error"]["message"]
        assert served.text("a") == tiny.answers["a"]


def test_what_is_to_be_preloaded_is_there_when_the_server_is_ready(config: ServerConfig) -> None:
    with serve(replace(config, models=replace(config.models, preload=("c",)))) as served:
        assert served.loaded() == {"a", "c"}


def test_metrics_tell_models_apart(served: Served) -> None:
    served.text("a")
    served.text("b")
    served.text("b")
    tokens = {name: served.metric("generation_tokens_total", model_name=name) for name in NAMES}
    assert tokens["b"] == 2 * (tokens["a"] or 0) and tokens["c"] is None
    http = {"tenant_class": "default", "method": "POST", "route": "/v1/completions", "status": "200"}
    assert served.metric("http_requests_total", model_name="b", **http) == 2
    loaded = [served.metric("model_loaded", model_name=name) for name in ("b", "c")]
    assert loaded == [1, 0]
    assert served.metric("model_load_seconds_count", model_name="b") == 1
    assert served.metric("kv_cache_usage_perc", model_name="b") is not None
    served.http.post("/admin/models/b/unload", headers=ADMIN).raise_for_status()
    assert served.metric("kv_cache_usage_perc", model_name="b") is None
    assert served.metric("kv_cache_usage_perc", model_name="a") is not None
    assert served.metric("generation_tokens_total", model_name="b") == tokens["b"]  # a counter never falls
    assert served.metric("model_loaded", model_name="b") == 0


def test_models_are_loaded_and_unloaded_by_hand(served: Served) -> None:
    answer = served.http.post("/admin/models/b/load", headers=ADMIN)
    assert answer.status_code == 202
    assert answer.json()["replicas"][0]["models"][1]["state"] in ("loading", "loaded")
    wait_until(lambda: served.loaded() == {"a", "b"})
    answer = served.http.post("/admin/models/b/unload", headers=ADMIN)
    assert answer.status_code == 200
    assert answer.json()["replicas"][0]["models"][1] == {
        "name": "b",
        "state": "not_loaded",
        "default": False,
        "requests": 0,
        "waiting": 0,
        "memory_bytes": None,
        "error": None,
    }
    assert served.http.post("/admin/models/b/unload", headers=ADMIN).status_code == 200  # it is not


@pytest.mark.usefixtures("slow_steps")
def test_what_cannot_be_unloaded_says_why(served: Served) -> None:
    with served.http.stream("POST", "/v1/completions", json=_long("b")) as stream:
        lines = stream.iter_lines()
        next(lines)
        answer = served.http.post("/admin/models/b/unload", headers=ADMIN)
        assert error_of(answer) == (409, "model_in_use", None)
    assert error_of(served.http.post("/admin/models/a/unload", headers=ADMIN)) == (409, "model_in_use", None)
    assert served.http.post("/admin/models/a/load", headers=ADMIN).status_code == 202
    for action in ("load", "unload"):
        assert error_of(served.http.post(f"/admin/models/x/{action}", headers=ADMIN))[:2] == (404, "model_not_found")


def test_only_administrators_load_and_unload(served: Served) -> None:
    for method, path in (("GET", ""), ("POST", "/b/load"), ("POST", "/b/unload")):
        response = served.http.request(method, f"/admin/models{path}")
        assert error_of(response)[:2] == (401, "invalid_admin_token")
    assert served.loaded() == {"a"}


def test_access_is_by_model_and_asked_for_before_anything_is_loaded(config: ServerConfig) -> None:
    with serve(replace(config, access=AccessConfig(enabled=True))) as served:
        key = served.http.post("/admin/keys", json={"owner": "o", "models": ["b"]}, headers=ADMIN).json()["key"]
        served.http.headers["Authorization"] = f"Bearer {key}"
        assert error_of(served.complete("c"))[:2] == (403, "model_not_allowed")
        assert error_of(served.complete(None))[:2] == (403, "model_not_allowed")
        assert error_of(served.http.get("/v1/models/c"))[:2] == (403, "model_not_allowed")
        assert [card["id"] for card in served.http.get("/v1/models").json()["data"]] == ["b"]
        assert served.loaded() == {"a"}
        assert served.complete("b").status_code == 200


def test_a_job_runs_on_the_model_that_it_names(served: Served, tiny: TinyModels) -> None:
    body = {"model": "b", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    job = served.http.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body}).json()
    wait_until(lambda: served.http.get(f"/v1/jobs/{job['id']}").json()["status"] in ("completed", "failed"))
    result = served.http.get(f"/v1/jobs/{job['id']}/result").json()
    assert result["choices"][0]["text"] == tiny.answers["b"]


def test_a_job_for_a_model_that_never_loads_ends(config: ServerConfig, tmp_path: Path) -> None:
    others = config.models.others | {"broken": EngineConfig(str(tmp_path / "nowhere"))}
    with serve(replace(config, models=replace(config.models, others=others))) as served:
        body = {"model": "broken", "prompt": PROMPT}
        job = served.http.post("/v1/jobs", json={"endpoint": "/v1/completions", "body": body}).json()
        path = f"/v1/jobs/{job['id']}"
        wait_until(lambda: served.http.get(path).json()["status"] not in ("queued", "in_progress"))
        assert served.http.get(path).json()["status"] == "failed"
        assert error_of(served.http.get(f"{path}/result")) == (503, "model_load_failed", "model")


@pytest.mark.usefixtures("slow_steps")
async def test_generations_of_all_models_may_end_when_the_server_stops(config: ServerConfig) -> None:
    metrics = PrometheusMetrics("a")
    state: ApiState = create_app(config, make_engine(config.model, metrics), metrics).state.api
    await state.start()
    num_tokens = dict.fromkeys(NAMES, 0)
    has_begun = {name: asyncio.Event() for name in NAMES}

    async def generate(name: str) -> None:
        async with state.using(LOCAL, name) as engine:
            request = GenerationRequest(name, (5, 6, 7), SamplingParams(max_tokens=300, ignore_eos=True))
            async for output in engine.generate(request):
                num_tokens[name] += len(output.token_ids)
                has_begun[name].set()

    generations = [asyncio.create_task(generate(name)) for name in NAMES]
    for each in has_begun.values():
        await each.wait()
    await state.stop()
    assert num_tokens == dict.fromkeys(NAMES, 300)
    await asyncio.gather(*generations)
    with pytest.raises(EngineStoppedError):
        async with state.using(LOCAL, "b"):
            pass


async def test_an_unloaded_engine_leaves_nothing_behind(config: ServerConfig) -> None:
    metrics = PrometheusMetrics("a")
    state: ApiState = create_app(config, make_engine(config.model, metrics), metrics).state.api
    await state.start()
    async with state.using(LOCAL, "b") as engine:
        left = weakref.ref(engine)
    del engine
    num_threads = threading.active_count()
    await state.models.unload_here("b")
    assert left() is None
    assert threading.active_count() == num_threads - 1
    await state.stop()


async def test_a_dead_engine_is_loaded_anew_and_the_server_goes_on(config: ServerConfig) -> None:
    metrics = PrometheusMetrics("a")
    state: ApiState = create_app(config, make_engine(config.model, metrics), metrics).state.api
    await state.start()
    async with state.using(LOCAL, "b") as engine:
        await engine.stop()
    async with state.using(LOCAL, "b") as another:
        assert another is not engine and another.stats().is_alive
    assert state.engine.stats().is_alive
    await state.stop()


def test_settings_that_cannot_work_are_named(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.others\.a: is the name of the default model"):
        tiny.server_config(tmp_path, others={"a": tiny.configs["b"]})


def _long(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "stream": True} | LONG
