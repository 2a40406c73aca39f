"""APT on Ray Serve: one deployment, each replica with its own engine. The only file that imports Ray.

`serve run deploy/config.yaml` calls ``build``, `apt-serve start` calls ``run``. Told to stop, both drain, the former
through ``drain_at_signals``: by itself Ray begins with the proxy, through which running requests answer.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from apt_core.config import parse
from apt_core.errors import AptError
from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions
from apt_serve.engine.config import EngineConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from apt_serve.api.handover import ReplicaWeights
    from apt_serve.api.model_fleet import ReplicaModels
    from apt_serve.engine.handover import SwapOrder
    from apt_serve.rpc.messages import ServeServices
    from apt_serve.server import Server

APPLICATION = "apt"
DEPLOYMENT = "apt"
CONNECTION_HEADROOM = 1024
"""Requests a replica takes beyond what its engines can hold: WebSockets (each counts for as long as it is open), health
checks, scrapes, and requests that the engine is to refuse in the API's own words."""
QUEUED_AT_PROXY = 256
"""Requests that may wait in front of full replicas; beyond that Serve answers 503 by itself."""
FLEET_TIMEOUT_S = 30.0
"""Every replica answers within this time when it is asked about weights or models, or the one that asks fails."""
LINGER_S = 5.0
"""When no request runs any more, connections that are still open, such as idle sockets, may close for this long."""


class StartError(AptError):
    """The server could not be started; the message says why."""


class Replica:
    """One replica: HTTP front and engine in one process, so that a token crosses no process on its way out."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._server: Server | None = None
        self._services: ServeServices | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica, after the constructor."""
        from apt_serve.rpc.messages import ServeServices
        from apt_serve.server import Server, log_to_stderr

        log_to_stderr()
        # vLLM's processes are no actors: without it they could not ask this cluster for workers on other nodes.
        os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        context = serve.get_replica_context()
        fleet = ServeFleet(context.deployment, context.app_name)
        server = Server(self._config, is_behind_serve=True, fleet=fleet, cancel=fleet.cancel)
        await server.start()
        self._server, self._services = server, ServeServices(server.rpc)
        return server.app

    async def Generate(self, request: Any, grpc_context: Any) -> Any:
        """These are called by Serve's gRPC proxy; see apt_serve/rpc/inference.proto."""
        return await self._rpc.Generate(request, grpc_context)

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        """See Generate."""
        async with aclosing(self._rpc.GenerateStream(request, grpc_context)) as messages:
            async for message in messages:
                yield message

    async def Chat(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        """See Generate."""
        async with aclosing(self._rpc.Chat(request, grpc_context)) as messages:
            async for message in messages:
                yield message

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:
        """See Generate."""
        return await self._rpc.ListModels(request, grpc_context)

    async def Cancel(self, request: Any, grpc_context: Any) -> Any:
        """See Generate."""
        return await self._rpc.Cancel(request, grpc_context)

    async def Check(self, request: Any, grpc_context: Any) -> Any:
        """Of grpc.health.v1.Health."""
        return await self._rpc.Check(request, grpc_context)

    async def List(self, request: Any, grpc_context: Any) -> Any:
        """Of grpc.health.v1.Health."""
        return await self._rpc.List(request, grpc_context)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        """Of grpc.health.v1.Health."""
        async with aclosing(self._rpc.Watch(request, grpc_context)) as messages:
            async for message in messages:
                yield message

    @property
    def _rpc(self) -> ServeServices:
        assert self._services
        return self._services

    async def check_health(self) -> None:
        """Called by Serve every few seconds; raising gets this replica replaced."""
        problem = self._server and self._server.problem()
        if problem:
            raise RuntimeError(problem)

    async def begin_swap(self, order: SwapOrder) -> ReplicaWeights:
        """Begin to change weights; called on every replica by the one that was asked."""
        assert self._server
        return await self._server.handover.begin_here(order)

    async def weights(self) -> ReplicaWeights:
        """What this replica says of its weights."""
        assert self._server
        return self._server.handover.weights_here()

    async def cancel_here(self, owner: str, request_id: str) -> bool:
        """End a generation of gRPC's, if it runs on this replica; called on every one."""
        assert self._server
        return self._server.rpc.running.cancel(owner, request_id)

    async def models(self) -> ReplicaModels:
        """What this replica says of its models."""
        assert self._server
        return self._server.models.report()

    async def load_model(self, name: str) -> ReplicaModels:
        """Begin to load a further model; called on every replica by the one that was asked."""
        assert self._server
        return await self._server.models.begin_load_here(name)

    async def unload_model(self, name: str) -> ReplicaModels:
        """Unload a further model, unless it is in use here."""
        assert self._server
        return await self._server.models.unload_here(name)

    async def drain(self) -> None:
        """Refuse new requests; return when running ones have finished or the grace period is over."""
        if self._server:
            await self._server.stop()


class ServeFleet:
    """All replicas of a deployment. One that starts meanwhile reads the pointer when it is ready."""

    def __init__(self, deployment: str, application: str) -> None:
        self._names = (deployment, application)

    async def begin(self, order: SwapOrder) -> list[ReplicaWeights]:
        """See Fleet."""
        return await self._ask("begin_swap", order)

    async def weights(self) -> list[ReplicaWeights]:
        """See Fleet."""
        return await self._ask("weights")

    async def cancel(self, owner: str, request_id: str) -> bool:
        """End a generation of gRPC's, whichever replica runs it."""
        return any(await self._ask("cancel_here", owner, request_id))

    async def models(self) -> list[ReplicaModels]:
        """See ModelFleet."""
        return await self._ask("models")

    async def load_model(self, name: str) -> list[ReplicaModels]:
        """See ModelFleet."""
        return await self._ask("load_model", name)

    async def unload_model(self, name: str) -> list[ReplicaModels]:
        """See ModelFleet."""
        return await self._ask("unload_model", name)

    async def _ask(self, method: str, *args: object) -> list[Any]:
        answers = serve.get_deployment_handle(*self._names).broadcast(method, *args)
        return await answers.results_async(timeout_s=FLEET_TIMEOUT_S)


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application from ``args`` in deploy/config.yaml.

    Raises:
        ConfigError: a setting is unknown or cannot work; it is named.
    """
    return application(parse(ServerConfig, args))


def application(config: ServerConfig) -> serve.Application:
    """The application of checked settings."""
    grace_s = config.api.shutdown_grace_s
    configure = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=config.replicas,
        # The engine's own queue is to be the one that fills up: it answers with a reason and Retry-After.
        max_ongoing_requests=config.max_requests + CONNECTION_HEADROOM,
        max_queued_requests=QUEUED_AT_PROXY,
        graceful_shutdown_timeout_s=grace_s + LINGER_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        # A model that does not load will not load at the third attempt either.
        max_constructor_retry_count=1,
        ray_actor_options=_actor_options(config),
    )
    bound: serve.Application = configure(serve.ingress()(Replica)).bind(config)
    return bound


def run(config: ServerConfig, http: HttpOptions, on_ready: Callable[[], None], grpc: GrpcOptions = NO_GRPC) -> None:
    """Serve on a Ray cluster of its own until SIGINT or SIGTERM; then drain, and stop the cluster.

    With RAY_ADDRESS set, joins that cluster instead and leaves it running.

    Raises:
        StartError: no replica could be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    try:
        # Without the dashboard the cluster is up in five seconds instead of nine.
        ray.init(address=address) if address else ray.init(address="local", include_dashboard=False)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": http.host, "port": http.port},
            grpc_options={"port": grpc.port, "grpc_servicer_functions": list(grpc.grpc_servicer_functions)},
        )
        _deploy(config)
        stop = _event_at_signals()
        on_ready()
        stop.wait()
        _drain()
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(config: ServerConfig) -> None:
    try:
        serve.run(application(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        details = status.deployments[DEPLOYMENT].message if status and DEPLOYMENT in status.deployments else ""
        raise StartError(f"the server did not start: {_last_line(details) or error}") from error


def _last_line(traceback: str) -> str:
    """What went wrong, without how Ray came upon it."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _actor_options(config: ServerConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        # What the engine takes is num_threads' business. Reserving whole cores would leave a replica waiting for
        # ever on a small machine.
        "num_cpus": 0.1,
    }
    models = (config.model, *config.models.others.values())
    has_gpus = _has_gpus()
    on_gpus = [model for model in models if model.device == "cuda" or (model.device == "auto" and has_gpus)]
    if on_gpus:
        options["num_gpus"] = max(map(_num_gpus, on_gpus))
    return options


def _num_gpus(model: EngineConfig) -> int:
    """GPUs for one of its models: all that its engine splits it over, unless that engine asks Ray for them by itself.

    Ranks are processes of the replica and share what Ray gives it.
    """
    if model.vllm_args.get("distributed_executor_backend") == "ray":
        return 0
    return model.num_workers


def _has_gpus() -> bool:
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0


def _event_at_signals() -> threading.Event:
    """Set at the first SIGINT or SIGTERM. The second one interrupts whatever runs then."""
    event = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            sys.exit(128 + number)
        event.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return event


def _drain() -> None:
    """Let requests finish before ``serve.shutdown``, which begins by killing the proxy they stream through.

    Takes as long as the replicas' grace period allows.
    """
    applications = serve.status().applications
    names = [name for name, status in applications.items() if DEPLOYMENT in status.deployments]
    waits = [serve.get_deployment_handle(DEPLOYMENT, name).broadcast("drain") for name in names]
    for wait in waits:
        wait.results(timeout_s=None)
    for name in names:
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + LINGER_S
    while not serve.status().applications.keys().isdisjoint(names) and time.monotonic() < deadline:
        time.sleep(0.1)


def drain_at_signals(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """Let `serve run` drain at SIGINT and SIGTERM, which nothing in an application's own reach can do.

    Ray calls the function that the environment variable RAY_RUNTIME_ENV_HOOK names in every process that connects to a
    cluster; in others than `serve run` this one does nothing.
    """
    is_serve_run = Path(sys.argv[0]).name == "serve" and "run" in sys.argv
    if is_serve_run and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop_serve_run)
    return runtime_env


def _stop_serve_run(number: int, frame: FrameType | None) -> None:
    """Drain, and end Serve; the second signal interrupts that."""
    signal.alarm(0)  # Ray's own handler, which comes first, has set one that aborts the process in three seconds
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda again, _: sys.exit(128 + again))
    try:
        _drain()
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.exit(0)
