"""A gRPC server over an application, on a free port of 127.0.0.1, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from apt_serve.api.app import create_app
from apt_serve.api.metrics import PrometheusMetrics
from apt_serve.api.state import ApiState
from apt_serve.config import ServerConfig
from apt_serve.rpc.errors import DETAILS_KEY
from apt_serve.rpc.inference_pb2_grpc import InferenceStub
from apt_serve.rpc.listen import listening
from apt_serve.rpc.services import Services
from tests.apt_serve.api.scripted_engine import ScriptedEngine

T = TypeVar("T")


class LiveGrpc:
    """Scripted, unless another engine is given."""

    def __init__(self, config: ServerConfig, engine: Any = None) -> None:
        self.prometheus = PrometheusMetrics("scripted")
        self.engine = engine or ScriptedEngine(self.prometheus)
        app = create_app(config, self.engine, self.prometheus, runs_engine=False)
        self.state: ApiState = app.state.api
        self._config = config
        self._services = Services(self.state)
        self._loop = asyncio.new_event_loop()
        self._is_up = threading.Event()
        self._is_over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self.address = ""

    async def _run(self) -> None:
        await self.state.start()
        try:
            async with listening(self._services, self._config, "127.0.0.1", 0) as port:
                self.address = f"127.0.0.1:{port}"
                self._is_up.set()
                await self._is_over.wait()
                await self.state.stop()
        finally:
            self._is_up.set()

    def __enter__(self) -> LiveGrpc:
        self._thread.start()
        self._is_up.wait()
        assert self.address, "the server did not start"
        # Its own connection, so that no test meets the back-off of another's.
        self.channel = grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = InferenceStub(self.channel)
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


def trailers(call: Any) -> dict[str, Any]:
    return {name: value for name, value in call.trailing_metadata() or ()}


def details(error: Any) -> tuple[str, str | None, int | None]:
    """Reason, field and seconds to wait, out of google.rpc's details."""
    status = status_pb2.Status.FromString(trailers(error)[DETAILS_KEY])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    field = seconds = None
    for each in status.details:
        each.Unpack(info)
        if each.Unpack(bad):
            field = bad.field_violations[0].field
        if each.Unpack(retry):
            seconds = retry.retry_delay.ToSeconds()
    assert info.domain == "apt"
    return info.reason, field, seconds
