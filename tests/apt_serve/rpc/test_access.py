"""Who may call, how much they may take, and what is noted of calls."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry

from apt_serve.access.config import AccessConfig, TokenConfig, TokenKey
from apt_serve.access.identity import Scope
from apt_serve.access.key_store import KeyGrant
from apt_serve.config import ServerConfig
from apt_serve.limits.config import LimitsConfig, Quota
from apt_serve.records.config import RecordsConfig
from apt_serve.rpc.inference_pb2 import (
    CancelRequest,
    ChatRequest,
    GenerateRequest,
    ListModelsRequest,
    Message,
    Sampling,
)
from apt_serve.telemetry.access_log import AccessLog
from apt_serve.telemetry.config import TelemetryConfig
from tests.apt_serve.access.signing import AUDIENCE, ISSUER, SECRET, good_claims, hs256
from tests.apt_serve.api.live_server import wait_until
from tests.apt_serve.rpc.live_grpc import LiveGrpc, details, trailers
from tests.apt_serve.telemetry.collector import Collector
from tests.apt_serve.telemetry.test_observe import PARENT

SHORT = GenerateRequest(text="Hello", sampling=Sampling(max_tokens=3))
LONG = GenerateRequest(text="Hello", sampling=Sampling(max_tokens=3000, temperature=0), request_id="mine")
Metadata = tuple[tuple[str, str], ...]


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(scope="module")
def _guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGrpc]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_TOKEN_SECRET", SECRET)
        keys = {"shared": TokenKey("HS256", secret_variable="TEST_TOKEN_SECRET")}
        tokens = TokenConfig(issuer=ISSUER, audience=AUDIENCE, keys=keys)
        access = AccessConfig(enabled=True, cache_s=0.1, revocation_poll_s=0.1, tokens=tokens)
        records = RecordsConfig(folder=str(tmp_path_factory.mktemp("records")))
        with LiveGrpc(ServerConfig(access=access, records=records)) as live:
            yield live


@pytest.fixture
def guarded(_guarded: LiveGrpc) -> LiveGrpc:
    """A server with access control."""
    _guarded.engine.script.token_delay_s = 0
    _guarded.engine.seen.clear()
    return _guarded


def key(live: LiveGrpc, owner: str = "alice", **grant: object) -> str:
    made, _ = live.do(live.state.access.create_key(KeyGrant(owner=owner, name=str(time.time()), **grant)))  # type: ignore[arg-type]
    return made.text


STRANGERS: list[Metadata] = [
    (),
    bearer(""),
    bearer("wrong"),
    bearer("apt_abcdefgh_" + "A" * 43),
    (("authorization", "Basic abc"),),
    bearer(hs256(good_claims() | {"exp": int(time.time()) - 3600})),
    bearer(hs256(good_claims() | {"aud": "other"})),
    (("x-user", "alice"), ("x-owner", "admin"), ("x-forwarded-user", "alice")),
    (("authorization-bin", b"Bearer x"),),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("metadata", STRANGERS, ids=range(len(STRANGERS)))
def test_strangers_are_unauthenticated_whatever_they_call(guarded: LiveGrpc, metadata: Metadata) -> None:
    messages = [Message(role="user", content="a")]
    stub = guarded.stub
    calls = (
        lambda: stub.Generate(SHORT, metadata=metadata),
        lambda: list(stub.GenerateStream(SHORT, metadata=metadata)),
        lambda: list(stub.Chat(ChatRequest(messages=messages), metadata=metadata)),
        lambda: stub.ListModels(ListModelsRequest(), metadata=metadata),
        lambda: stub.Cancel(CancelRequest(request_id="x"), metadata=metadata),
        lambda: guarded.channel.unary_unary("/apt.v1.Inference/Generate")(b"\xff", metadata=metadata),
    )
    said = set()
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        said.add(caught.value.details())
    assert len(said) == 1, "which part was wrong is nobody's business"
    assert not guarded.engine.seen


def test_two_keys_at_once_are_none(guarded: LiveGrpc) -> None:
    good = bearer(key(guarded))
    assert guarded.stub.Generate(SHORT, metadata=good)
    with pytest.raises(grpc.RpcError) as caught:
        guarded.stub.Generate(SHORT, metadata=good + good)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", ["key", "token"])
def test_a_key_and_a_token_open_the_door(guarded: LiveGrpc, kind: str) -> None:
    token = key(guarded) if kind == "key" else hs256(good_claims())
    assert guarded.stub.Generate(SHORT, metadata=bearer(token)).usage.completion_tokens == 3
    assert [model.name for model in guarded.stub.ListModels(ListModelsRequest(), metadata=bearer(token)).models]
    [seen] = guarded.engine.seen
    assert seen.tenant != "local"


def test_what_a_client_says_of_itself_is_not_believed(guarded: LiveGrpc) -> None:
    guarded.stub.Generate(SHORT, metadata=(*bearer(key(guarded)), ("x-owner", "bob"), ("x-tenant", "bob")))
    assert [request.tenant for request in guarded.engine.seen] == ["alice"]


def test_a_key_without_the_scope_is_refused(guarded: LiveGrpc) -> None:
    token = key(guarded, scopes=frozenset({Scope.JOBS}))
    with pytest.raises(grpc.RpcError) as caught:
        guarded.stub.Generate(SHORT, metadata=bearer(token))
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert details(caught.value) == ("INSUFFICIENT_SCOPE", None, None)


@pytest.mark.parametrize("model", ["", "scripted", "unknown"])
def test_a_key_for_other_models_is_refused_and_sees_none(guarded: LiveGrpc, model: str) -> None:
    metadata = bearer(key(guarded, models=frozenset({"other"})))
    with pytest.raises(grpc.RpcError) as caught:
        guarded.stub.Generate(GenerateRequest(text="a", model=model), metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert details(caught.value) == ("MODEL_NOT_ALLOWED", "model", None)
    assert not guarded.stub.ListModels(ListModelsRequest(), metadata=metadata).models


def test_a_key_that_is_revoked_ends_its_streams(guarded: LiveGrpc) -> None:
    guarded.engine.script.token_delay_s = 0.01
    token = key(guarded)
    stream = guarded.stub.GenerateStream(LONG, metadata=bearer(token))
    next(stream)
    guarded.do(guarded.state.access.revoke_key(token.split("_")[1]))
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    wait_until(lambda: not guarded.engine.running, 5)


def test_nobody_cancels_anothers_generation(guarded: LiveGrpc) -> None:
    guarded.engine.script.token_delay_s = 0.01
    alice, bob = bearer(key(guarded, "alice")), bearer(key(guarded, "bob"))
    stream = guarded.stub.GenerateStream(LONG, metadata=alice)
    next(stream)
    with pytest.raises(grpc.RpcError) as others:
        guarded.stub.Cancel(CancelRequest(request_id="mine"), metadata=bob)
    assert others.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as nobodys:
        guarded.stub.Cancel(CancelRequest(request_id="none"), metadata=bob)
    assert str(others.value.details()).replace("mine", "none") == nobodys.value.details()
    twin = guarded.stub.GenerateStream(LONG, metadata=bob)  # the same name, another's
    next(twin)
    guarded.stub.Cancel(CancelRequest(request_id="mine"), metadata=bearer(key(guarded, "alice")))
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    assert caught.value.code() == grpc.StatusCode.CANCELLED
    next(twin)
    twin.cancel()


def test_health_and_reflection_are_open_to_everybody(guarded: LiveGrpc) -> None:
    health = health_pb2_grpc.HealthStub(guarded.channel)
    for service in ("", "apt.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert set(health.List(health_pb2.HealthListRequest()).statuses) == {"", "apt.v1.Inference"}
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    names = set(ProtoReflectionDescriptorDatabase(guarded.channel).get_services())
    assert names == {"apt.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_a_client_can_be_made_from_reflection_alone(guarded: LiveGrpc) -> None:

    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(guarded.channel))
    method = pool.FindServiceByName("apt.v1.Inference").FindMethodByName("ListModels")
    ask, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    call = guarded.channel.unary_unary(
        "/apt.v1.Inference/ListModels", ask.SerializeToString, response_deserializer=answer.FromString
    )
    assert call(ask(), metadata=bearer(key(guarded))).models[0].name == "scripted"


def test_health_follows_the_engine_and_a_watch_is_told(tmp_path: Path) -> None:
    with LiveGrpc(ServerConfig(records=RecordsConfig(folder=str(tmp_path)))) as live:
        health = health_pb2_grpc.HealthStub(live.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        live.engine.script.is_stalled = True
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        live.engine.script.is_stalled = False
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        live.do(live.state.stop())
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(watch) == []


def limited(folder: Path, limits: LimitsConfig) -> LiveGrpc:
    return LiveGrpc(ServerConfig(limits=limits, records=RecordsConfig(folder=str(folder))))


def of(**quota: int) -> LimitsConfig:
    return LimitsConfig(classes={"default": Quota(**quota)})


def test_every_answer_says_where_the_limits_stand(tmp_path: Path) -> None:
    with limited(tmp_path, of(requests_per_minute=10, tokens_per_minute=1000)) as live:
        _, call = live.stub.Generate.with_call(SHORT)
        assert trailers(call)["x-ratelimit-remaining-requests"] == "9"
        stream = live.stub.GenerateStream(SHORT)
        list(stream)
        assert trailers(stream)["x-ratelimit-remaining-requests"] == "8"
        chat = live.stub.Chat(ChatRequest(messages=[Message(role="user", content="a")], sampling=SHORT.sampling))
        list(chat)
        assert trailers(chat)["x-ratelimit-remaining-requests"] == "7"
        assert trailers(chat)["x-ratelimit-limit-tokens"] == "1000"


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_limit_that_is_reached(tmp_path: Path, way: str) -> None:
    with limited(tmp_path, of(requests_per_minute=1)) as live:
        live.stub.Generate(SHORT)
        with pytest.raises(grpc.RpcError) as caught:
            live.stub.Generate(SHORT) if way == "generate" else list(live.stub.GenerateStream(SHORT))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        reason, _, seconds = details(caught.value)
        assert reason == "RATE_LIMIT_EXCEEDED"
        assert seconds is not None and 0 < seconds <= 61
        said = trailers(caught.value)
        assert said["retry-after"] == str(seconds)
        assert said["x-ratelimit-remaining-requests"] == "0"


def test_streams_count_while_they_run_and_give_back_when_cancelled(tmp_path: Path) -> None:
    with limited(tmp_path, of(concurrent_streams=1)) as live:
        live.engine.script.token_delay_s = 0.01
        stream = live.stub.GenerateStream(LONG)
        next(stream)
        with pytest.raises(grpc.RpcError) as caught:
            live.stub.Generate(SHORT)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        stream.cancel()
        wait_until(lambda: not live.engine.running)
        assert live.stub.Generate(SHORT)


def test_an_address_that_asks_too_often(tmp_path: Path) -> None:
    limits = LimitsConfig(requests_per_minute_per_address=3, trusted_proxies=("127.0.0.1",))
    with limited(tmp_path, limits) as live:
        for _ in range(3):
            live.stub.ListModels(ListModelsRequest())
        with pytest.raises(grpc.RpcError) as caught:
            live.stub.ListModels(ListModelsRequest())
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        live.stub.ListModels(ListModelsRequest(), metadata=(("x-forwarded-for", "10.0.0.9"),))
        health = health_pb2_grpc.HealthStub(live.channel)
        assert health.Check(health_pb2.HealthCheckRequest())


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, {"model_name": "scripted", **labels}) or 0.0


def test_calls_are_counted_by_tenant_class_and_logged(tmp_path: Path) -> None:
    config = ServerConfig(
        limits=LimitsConfig(classes={"gold": Quota(requests_per_minute=100)}),
        records=RecordsConfig(folder=str(tmp_path)),
        telemetry=TelemetryConfig(access_log=True),
    )
    log = io.StringIO()
    with LiveGrpc(replace(config, access=AccessConfig(enabled=True))) as live:
        live.state.observer._access_log = AccessLog(log)
        metadata = bearer(key(live, tenant_class="gold"))
        live.stub.Generate(SHORT, metadata=(*metadata, ("x-request-id", "trace-7")))
        list(live.stub.GenerateStream(SHORT, metadata=metadata))
        with pytest.raises(grpc.RpcError):
            live.stub.Generate(GenerateRequest(), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            live.stub.Generate(SHORT)
        registry = live.prometheus.registry
    gold = {"tenant_class": "gold", "method": "GRPC"}
    route = "/apt.v1.Inference/Generate"
    assert value(registry, "apt:http_requests_total", route=route, status="200", **gold) == 1
    assert value(registry, "apt:http_requests_total", route=route, status="400", **gold) == 1
    stream = "/apt.v1.Inference/GenerateStream"
    assert value(registry, "apt:http_requests_total", route=stream, status="200", **gold) == 1
    nobody = {"tenant_class": "none", "method": "GRPC"}
    assert value(registry, "apt:http_requests_total", route=route, status="401", **nobody) == 1
    assert value(registry, "apt:request_generation_tokens_by_class_total", tenant_class="gold") == 6
    assert value(registry, "apt:request_time_to_first_token_seconds_count", tenant_class="gold") == 2
    assert value(registry, "apt:requests_rejected_total", reason="invalid_api_key") == 1
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["status"] for line in lines] == [200, 200, 400, 401]
    first = lines[0]
    assert (first["request_id"], first["method"], first["route"], first["owner"]) == ("trace-7", "GRPC", route, "alice")
    assert (first["prompt_tokens"], first["completion_tokens"], first["client"]) == (6, 3, "127.0.0.1")
    assert "Hello" not in log.getvalue()


def test_a_call_that_was_left_is_logged_as_such(live: LiveGrpc) -> None:
    live.engine.script.token_delay_s = 0.01
    name, labels = "apt:http_requests_total", {"tenant_class": "default", "method": "GRPC"}
    route = "/apt.v1.Inference/GenerateStream"

    def count(status: str) -> float:
        return value(live.prometheus.registry, name, route=route, status=status, **labels)

    left, late = count("499"), count("504")
    stream = live.stub.GenerateStream(LONG)
    next(stream)
    stream.cancel()
    wait_until(lambda: count("499") == left + 1, 5)
    with pytest.raises(grpc.RpcError):
        list(live.stub.GenerateStream(LONG, timeout=0.2))
    wait_until(lambda: count("499") + count("504") == left + late + 2, 5)


def test_a_trace_continues_the_callers(tmp_path: Path, collector: Collector) -> None:
    config = ServerConfig(
        telemetry=TelemetryConfig(traces_endpoint=collector.url), records=RecordsConfig(folder=str(tmp_path))
    )
    with LiveGrpc(config) as live:
        stream = live.stub.GenerateStream(SHORT, metadata=(("traceparent", PARENT),))
        list(stream)
        returned = str(trailers(stream)["traceparent"])
    trace_id, parent_id = PARENT.split("-")[1:3]
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == trace_id}
    assert set(spans) == {"GRPC /apt.v1.Inference/GenerateStream", "admission", "queue", "prefill", "decode"}
    whole = spans["GRPC /apt.v1.Inference/GenerateStream"]
    assert whole.parent_span_id.hex() == parent_id
    assert returned.split("-")[1:3] == [trace_id, whole.span_id.hex()]
    assert b"Hello" not in collector.raw
