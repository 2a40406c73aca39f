"""What a ModelCache needs of the world: who loads models, and who is told of it."""

from __future__ import annotations

from typing import Protocol

from apt_serve.engine.client import EngineClient


class ModelLoader(Protocol):
    """Makes engines of names. All methods are called on one event loop."""

    async def memory_need(self, name: str) -> int:
        """Bytes that a model takes from the beginning of ``load`` to the end of ``stop``.

        Raises:
            AptError: it cannot be loaded.
        """

    async def load(self, name: str) -> EngineClient:
        """A started engine. Nothing is left behind if it fails.

        Raises:
            AptError: it cannot be loaded.
        """

    async def stop(self, name: str, engine: EngineClient, grace_s: float) -> None:
        """End an engine as ``EngineClient.stop`` does."""

    def reclaim(self) -> None:
        """Give back the memory of a stopped engine, which nobody refers to any more."""


class CacheEvents(Protocol):
    """Told of what a ModelCache does."""

    def model_loaded(self, name: str, engine: EngineClient, seconds: float) -> None:
        """A model is ready."""

    def model_load_failed(self, name: str) -> None:
        """A model could not be loaded."""

    def model_unloaded(self, name: str, *, is_evicted: bool) -> None:
        """A model takes no requests any more; is_evicted: to make room for another."""


class NoEvents:
    """CacheEvents that nobody is told of."""

    def model_loaded(self, name: str, engine: EngineClient, seconds: float) -> None:
        """See CacheEvents."""

    def model_load_failed(self, name: str) -> None:
        """See CacheEvents."""

    def model_unloaded(self, name: str, *, is_evicted: bool) -> None:
        """See CacheEvents."""
