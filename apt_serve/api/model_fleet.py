"""What replicas say of their models, and who may be told to load and unload them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from apt_serve.api.handover import Fleet

ModelState = Literal["loaded", "loading", "stopping", "not_loaded"]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model on one replica."""

    name: str
    state: ModelState
    is_default: bool
    """Loaded at the start, and for as long as the server runs."""
    num_requests: int
    """That use it now."""
    num_waiting: int
    """That wait for it to be loaded."""
    num_bytes: int | None
    """Reserved for its weights and KV cache; None where nothing is, and for the default model."""
    error: str | None
    """Why its latest load failed; None if it did not."""


@dataclass(frozen=True, slots=True)
class ReplicaModels:
    """All models of one replica."""

    models: tuple[ModelReport, ...]
    refusal: str | None = None
    """Why an order was not taken."""


class ModelFleet(Protocol):
    """All replicas of the server, this one included."""

    async def models(self) -> list[ReplicaModels]:
        """What every replica says of its models."""

    async def load_model(self, name: str) -> list[ReplicaModels]:
        """Let every replica begin to load a model, if it has not; what each says then."""

    async def unload_model(self, name: str) -> list[ReplicaModels]:
        """Let every replica unload a model, unless it is in use there; what each says then."""


class ServerFleet(Fleet, ModelFleet, Protocol):
    """All replicas, for weights and models."""
