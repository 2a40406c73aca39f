"""Adds the services to a gRPC server. Ray Serve's proxy imports it, so it imports nothing of the server's."""

from __future__ import annotations

from typing import Any

from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from apt_serve.rpc.inference_pb2_grpc import add_InferenceServicer_to_server


def add_services(services: Any, server: Any) -> None:
    """Add apt.v1.Inference and grpc.health.v1.Health.

    Ray Serve's proxy calls it by its import path (grpc_options.grpc_servicer_functions), and calls the methods of these
    names on a replica.

    Args:
        services: has the methods of both.
        server: gRPC's.
    """
    add_InferenceServicer_to_server(services, server)
    add_HealthServicer_to_server(services, server)
