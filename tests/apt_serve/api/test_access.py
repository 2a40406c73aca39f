"""Who may come in, over HTTP and WebSocket, on a server with access control."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import event
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from apt_core.errors import ConfigError
from apt_serve.access import authenticator
from apt_serve.access.config import AccessConfig, TokenConfig, TokenKey
from apt_serve.access.key_store import KeyStore
from apt_serve.api.access import PUBLIC_PATHS
from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.config import AdminConfig, ServerConfig
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database, RecordsError
from tests.apt_serve.access.signing import AUDIENCE, ISSUER, SECRET, good_claims, hs256
from tests.apt_serve.api.live_server import LiveServer, wait_until
from tests.apt_serve.api.scripted_engine import ScriptedEngine

ADMIN_TOKEN = "correct-horse-battery-staple"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


ADMIN = bearer(ADMIN_TOKEN)


@dataclass(frozen=True)
class Guarded:
    """A server with access control."""

    http: httpx.Client
    engine: ScriptedEngine
    config: ServerConfig
    app: Any

    def create(self, **fields: Any) -> dict[str, Any]:
        response = self.http.post("/admin/keys", json={"owner": "alice"} | fields, headers=ADMIN)
        assert response.status_code == 201, response.text
        key: dict[str, Any] = response.json()
        return key

    def chat(self, token: str, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=CHAT | fields, headers=bearer(token))

    @property
    def websocket_url(self) -> str:
        return str(self.http.base_url).replace("http", "ws", 1).rstrip("/") + "/ws/generate"


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_TOKEN_SECRET", SECRET)
        tokens = TokenConfig(ISSUER, AUDIENCE, keys={"shared": TokenKey("HS256", secret_variable="TEST_TOKEN_SECRET")})
        config = ServerConfig(
            access=AccessConfig(enabled=True, cache_s=600, revocation_poll_s=0.2, tokens=tokens),
            admin=AdminConfig(token=ADMIN_TOKEN),
            records=RecordsConfig(folder=str(tmp_path_factory.mktemp("records"))),
        )
        prometheus = PrometheusMetrics("scripted")
        engine = ScriptedEngine(prometheus)
        app = create_app(config, engine, prometheus)
        with LiveServer(app) as server, httpx.Client(base_url=server.base_url, timeout=30) as http:
            yield Guarded(http, engine, config, app)


@pytest.fixture
def server(_server: Guarded) -> Guarded:
    """The server, with no keys that another test could count."""
    _server.engine.script = type(_server.engine.script)()
    for key in _server.http.get("/admin/keys", headers=ADMIN).json()["data"]:
        _server.http.delete(f"/admin/keys/{key['id']}", headers=ADMIN)
    return _server


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"]


NOBODY = (401, "authentication_error", "invalid_api_key")


def test_a_key_and_a_token_let_in(server: Guarded) -> None:
    assert server.chat(server.create()["key"]).status_code == 200
    assert server.chat(hs256(good_claims())).status_code == 200


def test_bad_credentials_are_refused_alike(server: Guarded) -> None:
    one, other = server.create(owner="alice")["key"], server.create(owner="bob")["key"]
    prefix, secret = one[:13], other[13:]
    attacks: list[Any] = [
        {},
        bearer(one[:-1]),
        bearer(one + "A"),
        bearer(prefix + secret),  # the id of one with the secret of another
        bearer(one.upper()),
        bearer("apt_aaaaaaaa_" + one[13:]),
        bearer(hs256(good_claims(), key=b"x" * 48)),
        bearer(ADMIN_TOKEN[:-1]),
        bearer("x" * 10_000),
        {"Authorization": f"Basic {one}"},
        {"Authorization": one},
        [("Authorization", f"Bearer {one}"), ("Authorization", f"Bearer {one}")],
        {"X-API-Key": one},
        {"Authorization": "Bearer \xfc".encode("latin-1")},
    ]
    answers = [server.http.post("/v1/chat/completions", json=CHAT, headers=headers) for headers in attacks]
    assert [error_of(each) for each in answers] == [NOBODY] * len(attacks)
    assert len({each.json()["error"]["message"] for each in answers}) == 1
    assert answers[0].headers["WWW-Authenticate"] == "Bearer"
    assert answers[0].headers["X-Request-ID"]


def test_a_stranger_is_answered_before_the_body_is_read(server: Guarded) -> None:
    async def refuse_to_read() -> Any:
        raise AssertionError("the body was read")

    async def statuses() -> list[int]:
        sent: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await server.app(scope, refuse_to_read, send)
        return sent

    assert asyncio.run(statuses()) == [401]


def test_headers_about_oneself_are_ignored(server: Guarded) -> None:
    forged = {"X-Owner": "admin", "X-Identity": "admin", "X-Forwarded-User": "admin", "X-APT-Scopes": "admin"}
    key = server.create()["key"]
    assert error_of(server.http.get("/admin/keys", headers=forged)) == NOBODY
    assert server.http.get("/admin/keys", headers=forged | bearer(key)).status_code == 403


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json", "/metrics"])
def test_what_is_public(server: Guarded, path: str) -> None:
    assert server.http.get(path).status_code == 200


def test_everything_else_is_closed(server: Guarded) -> None:
    """Unknown paths too, or a stranger could tell which are there."""
    for method, path in (("GET", "/v1/models"), ("GET", "/models"), ("GET", "/nowhere"), ("POST", "/health")):
        assert error_of(server.http.request(method, path)) == NOBODY


def test_the_documentation_shows_without_a_key(server: Guarded) -> None:
    page = server.http.get("/docs").text
    assets = [part.split('"')[0] for part in page.split('"/')[1:]]
    assets = [f"/{asset}" for asset in assets if "." in asset]
    assert any("swagger" in asset for asset in assets)
    assert [server.http.get(asset).status_code for asset in assets] == [200] * len(assets)


def test_every_route_says_who_may_use_it(server: Guarded) -> None:
    """A route without a scope would be open to every key."""
    routes = [each for each in _routes(server.app.routes) if each.path not in PUBLIC_PATHS | {"/metrics"}]
    assert len(routes) > 10
    for route in routes:
        names = [dependency.call.__qualname__ for dependency in route.dependant.dependencies if dependency.call]
        is_scoped = "needs.<locals>.check" in names or type(route).__name__ in ("AdminRoute", "AdminJsonRoute")
        assert is_scoped, route.path


def _routes(routes: Any) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route


def test_a_key_does_only_what_it_is_for(server: Guarded) -> None:
    inference, jobs = server.create()["key"], server.create(name="jobs", scopes=["jobs"])["key"]
    lacks = (403, "permission_error", "insufficient_scope")
    assert error_of(server.chat(jobs)) == lacks
    for method, path in (("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/weights")):
        assert error_of(server.http.request(method, path, headers=bearer(inference))) == lacks
    admin = server.create(name="admin", scopes=["admin"])["key"]
    assert server.http.get("/admin/keys", headers=bearer(admin)).status_code == 200


def test_a_key_may_use_only_its_models(server: Guarded) -> None:
    key = server.create(models=["other"])["key"]
    denied = (403, "permission_error", "model_not_allowed")
    assert error_of(server.chat(key)) == denied  # the default one
    assert error_of(server.chat(key, model="scripted")) == denied
    assert error_of(server.chat(key, model="no-such")) == denied
    assert error_of(server.chat(key, model="other"))[0] == 404
    assert error_of(server.http.post("/generate", json={"text": "a"}, headers=bearer(key))) == denied
    assert error_of(server.http.post("/tokenize", json={"prompt": "a"}, headers=bearer(key))) == denied
    assert server.http.get("/v1/models", headers=bearer(key)).json()["data"] == []
    assert server.http.get("/models", headers=bearer(key)).json()["models"] == []
    allowed = server.create(name="b", models=["scripted"])["key"]
    assert server.chat(allowed).status_code == 200
    assert len(server.http.get("/v1/models", headers=bearer(allowed)).json()["data"]) == 1


def test_the_key_is_shown_once_and_not_kept(server: Guarded) -> None:
    made = server.create(name="secret")
    assert server.http.get("/admin/keys", headers=ADMIN).text.count(made["id"]) == 1
    secret = made["key"].split("_", 2)[2]
    assert secret not in server.http.get("/admin/keys", headers=ADMIN).text
    files = [file for file in server.config.records.path.iterdir() if file.is_file()]
    assert files
    assert all(secret.encode() not in file.read_bytes() for file in files)
    assert (server.config.records.path / "key_pepper").stat().st_mode & 0o777 == 0o600


def test_rotation_gives_both_keys_a_while(server: Guarded) -> None:
    old = server.create(scopes=["inference", "jobs"])
    assert server.chat(old["key"]).status_code == 200
    path = f"/admin/keys/{old['id']}/rotate"
    new = server.http.post(path, json={"overlap_s": 2}, headers=ADMIN).json()
    assert new["scopes"] == ["inference", "jobs"]
    assert server.chat(new["key"]).status_code == server.chat(old["key"]).status_code == 200
    assert error_of(server.http.post(path, json={}, headers=ADMIN))[::2] == (409, "too_many_keys")
    wait_until(lambda: server.chat(old["key"]).status_code == 401, timeout_s=30)
    assert server.chat(new["key"]).status_code == 200
    assert error_of(server.http.post("/admin/keys/aaaaaaaa/rotate", json={}, headers=ADMIN))[0] == 404


def test_an_expired_key_is_no_key_whether_or_not_it_is_in_the_cache(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(authenticator, "time", SimpleNamespace(time=lambda: now))
    cached, unused = (server.create(expires_in_s=300) for _ in range(2))
    now = cached["expires_at"] - 1
    assert server.chat(cached["key"]).status_code == 200
    now = unused["expires_at"] + 1
    for made in (cached, unused):
        assert error_of(server.chat(made["key"])) == NOBODY


def test_a_revoked_key_is_no_key_although_it_is_in_the_cache(server: Guarded) -> None:
    made = server.create()
    assert server.chat(made["key"]).status_code == 200
    assert server.http.delete(f"/admin/keys/{made['id']}", headers=ADMIN).json()["is_live"] is False
    assert error_of(server.chat(made["key"])) == NOBODY


def revoke_elsewhere(server: Guarded, key_id: str) -> None:
    """As another replica, or the command, would."""

    async def revoke() -> None:
        database = Database(server.config.records)
        await KeyStore(database).revoke(key_id)
        await database.close()

    asyncio.run(revoke())


def test_a_stream_ends_soon_after_its_key_was_revoked_elsewhere(server: Guarded) -> None:
    server.engine.script.token_delay_s = 0.02
    made = server.create()
    body = CHAT | {"stream": True, "max_tokens": 3000}
    with server.http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(made["key"])) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        revoke_elsewhere(server, made["id"])
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    wait_until(lambda: server.engine.stats().num_running == 0)


def test_a_request_costs_no_query(server: Guarded) -> None:
    key, statements = server.create()["key"], []
    engine = server.app.state.api.database._engine.sync_engine
    server.chat(key)

    def count(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "api_keys.id =" in statement:
            statements.append(statement)

    event.listen(engine, "before_cursor_execute", count)
    try:
        assert [server.chat(key).status_code for _ in range(5)] == [200] * 5
        assert statements == []
        server.chat("apt_aaaaaaaa_" + "a" * 43)
        assert len(statements) == 1
    finally:
        event.remove(engine, "before_cursor_execute", count)


def test_a_socket_by_header_and_by_first_message(server: Guarded) -> None:
    key = server.create()["key"]
    generate = json.dumps({"type": "generate", "id": "a", "prompt": "Hi", "max_tokens": 1})
    authenticate = json.dumps({"type": "authenticate", "token": key})
    with connect(server.websocket_url, additional_headers=bearer(key)) as socket:
        socket.send(generate)
        assert json.loads(socket.recv(30))["type"] == "start"
        socket.send(authenticate)
        messages = [json.loads(socket.recv(30)) for _ in range(3)]
        assert "already_authenticated" in [m["error"]["code"] for m in messages if m["type"] == "error"]
    with connect(server.websocket_url) as socket:
        socket.send(authenticate)
        socket.send(generate)
        assert json.loads(socket.recv(30))["type"] == "start"


@pytest.mark.parametrize(
    "first",
    [
        '{"type": "generate", "id": "a", "prompt": "Hi"}',
        '{"type": "authenticate", "token": "apt_aaaaaaaa_wrong"}',
        '{"type": "authenticate"}',
        "no json",
        b"binary",
    ],
)
def test_a_socket_that_proves_nothing_is_closed(server: Guarded, first: str | bytes) -> None:
    with connect(server.websocket_url) as socket:
        socket.send(first)
        with pytest.raises(ConnectionClosed):
            socket.recv(30)
        assert socket.close_code == 4401


def test_a_socket_of_a_key_for_something_else_is_closed(server: Guarded) -> None:
    with connect(server.websocket_url, additional_headers=bearer(server.create(scopes=["jobs"])["key"])) as socket:
        with pytest.raises(ConnectionClosed):
            socket.recv(30)
        assert socket.close_code == 4403


def test_sockets_that_are_not_even_opened(server: Guarded) -> None:
    key = server.create()["key"]
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("", {"additional_headers": bearer(key + "x")}, 401),
        (f"?token={key}", {}, 401),
        (f"?access_token={key}", {"additional_headers": bearer(key)}, 401),
        ("", {"additional_headers": bearer(key), "origin": "https://evil.example"}, 403),
    ]
    for query, options, status in cases:
        with pytest.raises(InvalidStatus) as refused, connect(server.websocket_url + query, **options):
            pass
        assert refused.value.response.status_code == status
    assert error_of(server.http.get(f"/v1/models?api_key={key}", headers=bearer(key)))[2] == "key_in_url"


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_socket_ends_with_its_key(server: Guarded, how: str) -> None:
    made = server.create(expires_in_s=1.0 if how == "expired" else None)
    with connect(server.websocket_url, additional_headers=bearer(made["key"])) as socket:
        if how == "revoked":
            revoke_elsewhere(server, made["id"])
        with pytest.raises(ConnectionClosed):
            socket.recv(30)
        assert socket.close_code == 4401


def test_deep_and_large_json_is_refused(server: Guarded) -> None:
    headers = bearer(server.create()["key"]) | {"Content-Type": "application/json"}
    deep = server.http.post("/v1/completions", content=b"[" * 100_000, headers=headers)
    assert deep.status_code == 400
    large = b'{"prompt": "' + b"a" * (5 * 1024 * 1024) + b'"}'
    assert server.http.post("/v1/completions", content=large, headers=headers).status_code == 413


def test_records_that_do_not_answer_are_no_reason_to_refuse_or_to_let_in(
    server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, other = server.create()["key"], server.create(name="other")["key"]
    assert server.chat(known).status_code == 200

    async def fail(*_: Any) -> None:
        raise RecordsError("no disk")

    monkeypatch.setattr(KeyStore, "find", fail)
    assert server.chat(known).status_code == 200  # from the cache
    assert error_of(server.chat(other))[::2] == (503, "records_unavailable")


def test_metrics_may_be_closed_and_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = RecordsConfig(folder=str(tmp_path / "r"))
    config = ServerConfig(access=AccessConfig(enabled=True, public_metrics=False), records=records)
    prometheus = PrometheusMetrics("scripted")
    with LiveServer(create_app(config, ScriptedEngine(prometheus), prometheus)) as live:
        assert httpx.get(f"{live.base_url}/metrics").status_code == 401
    monkeypatch.setenv("APT_KEY_PEPPER", "short")
    with pytest.raises(ConfigError, match="pepper"):
        create_app(config, ScriptedEngine(prometheus), prometheus)


def test_without_access_control_nothing_is_asked_and_nothing_is_kept(tmp_path: Path) -> None:
    config = ServerConfig(records=RecordsConfig(folder=str(tmp_path / "none")))
    prometheus = PrometheusMetrics("scripted")
    with LiveServer(create_app(config, ScriptedEngine(prometheus), prometheus)) as live:
        url = live.base_url
        for headers in ({}, bearer("anything")):
            assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
        assert httpx.get(f"{url}/admin/keys").status_code == 404
        with connect(url.replace("http", "ws", 1) + "/ws/generate?token=x") as socket:
            socket.send(json.dumps({"type": "authenticate", "token": "anything"}))
            socket.send(json.dumps({"type": "generate", "id": "a", "prompt": "Hi", "max_tokens": 1}))
            assert json.loads(socket.recv(30))["type"] == "start"
    assert not (tmp_path / "none").exists()
