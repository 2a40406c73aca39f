"""/admin/models."""

from __future__ import annotations

from apt_serve.api.model_fleet import ModelReport, ModelState, ReplicaModels
from apt_serve.api.schemas.base import ResponseSchema


class ModelStatus(ResponseSchema):
    """One model on one replica."""

    name: str
    state: ModelState
    default: bool
    """Always loaded."""
    requests: int
    """That use it now."""
    waiting: int
    """Requests that wait for it to be loaded."""
    memory_bytes: int | None
    """Reserved for weights and KV cache; null while it is not loaded, and for the default model."""
    error: str | None
    """Why its latest load failed; null if it did not."""

    @classmethod
    def of(cls, report: ModelReport) -> ModelStatus:
        """As the replica says."""
        return cls(
            name=report.name,
            state=report.state,
            default=report.is_default,
            requests=report.num_requests,
            waiting=report.num_waiting,
            memory_bytes=report.num_bytes,
            error=report.error,
        )


class ReplicaModelsState(ResponseSchema):
    """The models of one replica."""

    models: list[ModelStatus]


class ModelsResponse(ResponseSchema):
    """The models of all replicas."""

    replicas: list[ReplicaModelsState]

    @classmethod
    def of(cls, replicas: list[ReplicaModels]) -> ModelsResponse:
        """As the replicas say."""
        return cls(
            replicas=[ReplicaModelsState(models=[ModelStatus.of(each) for each in one.models]) for one in replicas]
        )
