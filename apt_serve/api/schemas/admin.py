"""/admin/weights."""

from __future__ import annotations

from pydantic import Field

from apt_serve.api.handover import ReplicaWeights
from apt_serve.api.schemas.base import RequestSchema, ResponseSchema, example
from apt_serve.engine.handover import SwapMode, SwapReport


class WeightsRequest(RequestSchema):
    """Load published weights and change over to them."""

    model_config = example(path="/weights/step-1200", swap="overlap")

    path: str = Field(min_length=1, max_length=4096, description="Folder with a manifest, below admin.weight_folders.")
    swap: SwapMode | None = Field(None, description="What becomes of running requests; left out, what admin.swap says.")
    timeout_s: float | None = Field(
        None, gt=0, le=86400, description="How long those may go on; left out, admin.swap_timeout_s."
    )


class SwapState(ResponseSchema):
    """A swap of one replica."""

    phase: str
    """checking, loading, preparing, draining, done or failed."""
    path: str
    swap: SwapMode
    from_version: str
    to_version: str | None
    seconds: float
    """From the order to the end or, while it goes on, to the beginning of this phase."""
    ended_generations: int
    """On the old weights, that ended with an error."""
    error: str | None

    @classmethod
    def of(cls, report: SwapReport) -> SwapState:
        """As the engine reports it."""
        return cls(
            phase=report.phase.value,
            path=str(report.order.path),
            swap=report.order.mode,
            from_version=report.from_version,
            to_version=report.to_version,
            seconds=report.seconds,
            ended_generations=report.num_ended,
            error=report.error,
        )


class ReplicaState(ResponseSchema):
    """The weights of one replica."""

    weight_version: str
    swap: SwapState | None
    """The latest; null if there was none."""


class WeightsResponse(ResponseSchema):
    """The weights of all replicas."""

    replicas: list[ReplicaState]

    @classmethod
    def of(cls, replicas: list[ReplicaWeights]) -> WeightsResponse:
        """As the replicas say."""
        states = [
            ReplicaState(
                weight_version=each.weight_version, swap=None if each.swap is None else SwapState.of(each.swap)
            )
            for each in replicas
        ]
        return cls(replicas=states)
