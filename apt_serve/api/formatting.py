"""What a front must say of a job's deltas, whatever carries it: the Formatter protocol and what its two kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from apt_serve.api.generation import ChoiceDelta, Job
from apt_serve.api.schemas.base import ResponseSchema
from apt_serve.api.schemas.common import Usage


class Formatter(Protocol):
    """Turns deltas into the bodies of one endpoint. One formatter serves one request; it may keep state."""

    def chunks(self, delta: ChoiceDelta, usage: Usage | None) -> Sequence[ResponseSchema]:
        """The events of a streamed answer that a delta stands for, with the usage so far if it is wanted."""

    def usage_chunk(self, usage: Usage) -> ResponseSchema:
        """The last event of a stream whose client asked for the usage."""

    def response(self, choices: Sequence[ChoiceDelta], usage: Usage) -> ResponseSchema:
        """The whole answer."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every body of one answer repeats."""

    job: Job
    system_fingerprint: str

    def fields(self, object_name: str) -> dict[str, Any]:
        """Keyword arguments for the body."""
        return {
            "id": self.job.id,
            "object": object_name,
            "created": self.job.created,
            "model": self.job.model,
            "system_fingerprint": self.system_fingerprint,
        }


def present(**optional: Any) -> dict[str, Any]:
    """The keyword arguments that are not None: extensions that were not asked for stay out of the body."""
    return {name: value for name, value in optional.items() if value is not None}
