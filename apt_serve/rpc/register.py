"""Adds the services to a gRPC server. Ray Serve's proxy imports it, so it imports nothing of the server's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from apt_serve.rpc.inference_pb2_grpc import add_InferenceServicer_to_server


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Takes the place of a message whose bytes are none; gRPC by itself would answer UNKNOWN and name an exception."""

    problem: str


def add_services(services: Any, server: Any) -> None:
    """Add apt.v1.Inference and grpc.health.v1.Health.

    Ray Serve's proxy calls it by its import path (grpc_options.grpc_servicer_functions), and calls the methods of these
    names on a replica.

    Args:
        services: has the methods of both; each takes its message or an Undecodable.
        server: gRPC's.
    """
    lenient: Any = _LenientServer(server)
    add_InferenceServicer_to_server(services, lenient)
    add_HealthServicer_to_server(services, lenient)


class _LenientServer:
    """What generated code registers at, passed on to a server with other deserializers."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: generated code gives the same handlers to the other method."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        lenient = {
            name: handler._replace(request_deserializer=_lenient(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, lenient),))
        self._server.add_registered_method_handlers(service, lenient)


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize_or_tell(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return Undecodable(str(error))

    return deserialize_or_tell
