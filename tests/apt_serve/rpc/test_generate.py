"""The methods that generate: whole and streamed answers, and what a client gets for what it says wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.rpc.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    ChatRequest,
    GenerateRequest,
    Generation,
    ListModelsRequest,
    Message,
    Sampling,
    TokenIds,
)
from tests.apt_serve.api.conftest import CONFIG
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import TEXT, ScriptedEngine
from tests.apt_serve.rpc.live_grpc import LiveGrpc, details, trailers

HI = [Message(role="user", content="Hi")]


def greedy(**fields: object) -> Sampling:
    return Sampling(temperature=0, **fields)  # type: ignore[arg-type]


def request(text: str = "Hello", **sampling: object) -> GenerateRequest:
    return GenerateRequest(text=text, sampling=greedy(**sampling))


def joined(messages: list[Generation]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for message in messages:
        for choice in message.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def test_a_whole_answer(live: LiveGrpc) -> None:
    answer, call = live.stub.Generate.with_call(request(max_tokens=9))
    [choice] = answer.choices
    assert choice.text == TEXT[:9]
    assert bytes(choice.token_ids).decode() == TEXT[:9]
    assert choice.finish_reason == FINISH_REASON_LENGTH
    assert choice.WhichOneof("stop_reason") is None
    assert not choice.logprobs and not answer.prompt_token_ids
    assert (answer.model, answer.weight_version) == ("scripted", live.engine.model.weight_version)
    assert answer.created > 1_600_000_000
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens) == (6, 9, 3)
    assert trailers(call)["x-request-id"] == answer.request_id


def test_a_stream_says_what_the_whole_answer_says(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.002
    whole = live.stub.Generate(request(max_tokens=50, n=2))
    parts = list(live.stub.GenerateStream(request(max_tokens=50, n=2)))
    assert len(parts) > 3
    assert joined(parts) == {choice.index: choice.text for choice in whole.choices}
    for index in (0, 1):
        choices = [choice for part in parts for choice in part.choices if choice.index == index]
        assert [token for choice in choices for token in choice.token_ids] == list(whole.choices[index].token_ids)
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == [FINISH_REASON_LENGTH]
    assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].usage == whole.usage
    assert len({(part.request_id, part.model, part.weight_version, part.created) for part in parts}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_at_once_or_as_tokens_come(live: LiveGrpc, stream: bool) -> None:
    live.engine.script.token_delay_s = 0.002
    chat = ChatRequest(messages=HI, sampling=greedy(max_tokens=40), stream=stream)
    messages = list(live.stub.Chat(chat))
    assert (len(messages) == 1) is not stream
    assert joined(messages) == {0: TEXT.encode()[:40].decode()}
    assert messages[-1].choices[-1].finish_reason == FINISH_REASON_LENGTH
    assert messages[-1].usage.completion_tokens == 40


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_that_of_http(live: LiveGrpc, stream: bool) -> None:
    prometheus = PrometheusMetrics("scripted")
    app = create_app(CONFIG, ScriptedEngine(prometheus), prometheus)
    with LiveServer(app) as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "temperature": 1.0, "seed": 3}
        over_http = httpx.post(f"{server.base_url}/v1/chat/completions", json=body).json()
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=3)
    messages = list(live.stub.Chat(ChatRequest(messages=HI, sampling=sampling, stream=stream)))
    assert joined(messages)[0] == over_http["choices"][0]["message"]["content"]
    assert messages[-1].usage.prompt_tokens == over_http["usage"]["prompt_tokens"]


def test_what_is_not_set_takes_the_servers_default(live: LiveGrpc) -> None:
    assert live.stub.Generate(GenerateRequest(text="a")).usage.completion_tokens == 16
    [seen] = live.engine.seen
    assert (seen.sampling.temperature, seen.sampling.top_p, seen.sampling.n) == (1.0, 1.0, 1)
    assert seen.sampling.skip_special_tokens and seen.sampling.logprobs is None


def test_every_sampling_parameter_reaches_the_engine(live: LiveGrpc) -> None:
    sampling = Sampling(
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=9,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        logit_bias={5: -1.5},
        seed=-(2**63),
        n=2,
        stop=["§", "¶"],
        stop_token_ids=[7],
        include_stop_str_in_output=True,
        ignore_eos=True,
        min_tokens=3,
        skip_special_tokens=False,
        logprobs=2,
    )
    assert {field.name for field, _ in sampling.ListFields()} == set(Sampling.DESCRIPTOR.fields_by_name)
    live.stub.Generate(GenerateRequest(text="a", sampling=sampling, priority=3, cache_salt="salt"))
    list(live.stub.Chat(ChatRequest(messages=HI, sampling=sampling, priority=3, cache_salt="salt")))
    first, second = live.engine.seen
    assert first.sampling == second.sampling
    for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "min_tokens", "logprobs"):
        assert getattr(first.sampling, name) == getattr(sampling, name)
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "skip_special_tokens", "ignore_eos"):
        assert getattr(first.sampling, name) == getattr(sampling, name)
    assert first.sampling.include_stop_str_in_output
    assert (first.sampling.stop, first.sampling.stop_token_ids) == (("§", "¶"), (7,))
    assert first.sampling.logit_bias == {5: -1.5}
    assert (first.priority, first.cache_salt, second.priority, second.cache_salt) == (3, "salt", 3, "salt")


def test_token_ids_are_a_prompt_too_and_come_back_if_wanted(live: LiveGrpc) -> None:
    ids = [72, 105]
    asked = GenerateRequest(token_ids=TokenIds(ids=ids), sampling=greedy(max_tokens=3), return_prompt_token_ids=True)
    parts = list(live.stub.GenerateStream(asked))
    assert list(parts[0].prompt_token_ids) == ids
    assert not any(part.prompt_token_ids for part in parts[1:])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_with_each_token(live: LiveGrpc, stream: bool) -> None:
    asked = request(max_tokens=4, logprobs=2)
    messages = list(live.stub.GenerateStream(asked)) if stream else [live.stub.Generate(asked)]
    entries = [entry for message in messages for choice in message.choices for entry in choice.logprobs]
    assert b"".join(entry.chosen.token for entry in entries) == TEXT[:4].encode()
    assert [entry.chosen.logprob for entry in entries] == [-1.0] * 4
    assert [each.logprob for each in entries[0].top] == [-0.5, -1.0]
    assert entries[0].top[0].token_id == (ord("O") + 128) % 256
    assert len(live.stub.Generate(request(max_tokens=1, logprobs=0)).choices[0].logprobs[0].top) == 0


def test_a_stop_string_is_named(live: LiveGrpc) -> None:
    [choice] = live.stub.Generate(request(max_tokens=40, stop=["p"])).choices
    assert (choice.text, choice.finish_reason, choice.stop_string) == (TEXT[: TEXT.index("p")], FINISH_REASON_STOP, "p")


def test_models_are_listed(live: LiveGrpc) -> None:
    [model] = live.stub.ListModels(ListModelsRequest()).models
    assert (model.name, model.max_model_len, model.has_chat_template) == ("scripted", 4096, True)
    assert model.weight_version == live.engine.model.weight_version


def test_thirty_two_streams_at_a_time(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.005
    alone = [joined(list(live.stub.GenerateStream(seeded(seed))))[0] for seed in range(4)]
    barrier = threading.Barrier(32)

    def stream(seed: int) -> str:
        barrier.wait()
        return joined(list(live.stub.GenerateStream(seeded(seed))))[0]

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(stream, [number % 4 for number in range(32)]))
    assert together == alone * 8
    wait_until(lambda: not live.engine.running)
    assert not live.engine.aborted


def seeded(seed: int) -> GenerateRequest:
    return GenerateRequest(text="a", sampling=Sampling(seed=seed, max_tokens=60, temperature=1.0))


WRONG = [
    (request(top_p=2), "sampling.top_p", "INVALID_VALUE"),
    (GenerateRequest(text="a", sampling=Sampling(temperature=float("nan"))), "sampling.temperature", "INVALID_VALUE"),
    (request(max_tokens=0), "sampling.max_tokens", "INVALID_REQUEST_ERROR"),
    (request(max_tokens=-1), "sampling.max_tokens", "INVALID_VALUE"),
    (request(n=129), "sampling.n", "INVALID_VALUE"),
    (request(logprobs=21), "sampling.logprobs", "INVALID_VALUE"),
    (request(logit_bias={5: 101.0}), "sampling.logit_bias.5", "INVALID_VALUE"),
    (request(logit_bias={4000: 1.0}), "sampling.logit_bias", "INVALID_REQUEST_ERROR"),
    (request(stop=["x"] * 17), "sampling.stop", "INVALID_VALUE"),
    (request(stop=[""]), "sampling.stop", "INVALID_REQUEST_ERROR"),
    (request(min_tokens=5, max_tokens=3), "sampling.min_tokens", "INVALID_REQUEST_ERROR"),
    (GenerateRequest(), "prompt", "MISSING_REQUIRED_PARAMETER"),
    (GenerateRequest(token_ids=TokenIds()), "prompt", "INVALID_VALUE"),
    (GenerateRequest(token_ids=TokenIds(ids=[-1])), "prompt.0", "INVALID_VALUE"),
    (GenerateRequest(token_ids=TokenIds(ids=[99999])), "prompt", "INVALID_REQUEST_ERROR"),
    (GenerateRequest(text="a" * 5000), "prompt", "CONTEXT_LENGTH_EXCEEDED"),
    (GenerateRequest(text="a", cache_salt="x" * 513), "cache_salt", "INVALID_VALUE"),
    (GenerateRequest(text="a", request_id="a b"), "request_id", "INVALID_VALUE"),
]


@pytest.mark.parametrize(("asked", "field", "reason"), WRONG, ids=lambda value: value if type(value) is str else "")
def test_a_wrong_field_is_named(live: LiveGrpc, asked: GenerateRequest, field: str, reason: str) -> None:
    for method in (live.stub.Generate, lambda each: list(live.stub.GenerateStream(each))):
        with pytest.raises(grpc.RpcError) as caught:
            method(asked)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert details(caught.value) == (reason, field, None)
    assert not live.engine.seen


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (ChatRequest(), "messages"),
        (ChatRequest(messages=[Message(role="robot", content="a")]), "messages.0.role"),
        (ChatRequest(messages=HI, sampling=Sampling(max_tokens=0)), "sampling.max_tokens"),
        (ChatRequest(messages=HI, sampling=Sampling(logprobs=21)), "sampling.logprobs"),
        (ChatRequest(messages=HI, sampling=Sampling(logprobs=-1)), "sampling.logprobs"),
        (ChatRequest(messages=[Message(role="user", content="a" * 5000)]), "messages"),
        (ChatRequest(messages=HI, sampling=Sampling(max_tokens=5000)), "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_field_of_a_chat_is_named(live: LiveGrpc, asked: ChatRequest, field: str, stream: bool) -> None:
    asked.stream = stream
    with pytest.raises(grpc.RpcError) as caught:
        list(live.stub.Chat(asked))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[1] == field


def test_a_model_that_is_not_served(live: LiveGrpc) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        live.stub.Generate(GenerateRequest(model="other", text="a"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert details(caught.value) == ("MODEL_NOT_FOUND", "model", None)
