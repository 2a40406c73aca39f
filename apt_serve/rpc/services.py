"""All gRPC services of a server."""

from __future__ import annotations

from apt_serve.api.state import ApiState
from apt_serve.rpc.health import HealthService
from apt_serve.rpc.inference import Cancel, InferenceService


class Services:
    """The methods of both services, by their names.

    Args:
        state: of the application that HTTP requests come to.
        cancel: for all replicas; None: there is this one alone.
    """

    def __init__(self, state: ApiState, cancel: Cancel | None = None) -> None:
        inference, health = InferenceService(state, cancel), HealthService(state)
        self.running = inference.running
        self.Generate = inference.Generate
        self.GenerateStream = inference.GenerateStream
        self.Chat = inference.Chat
        self.ListModels = inference.ListModels
        self.Cancel = inference.Cancel
        self.Check = health.Check
        self.List = health.List
        self.Watch = health.Watch
