"""What a front must say of a job's deltas, whatever carries it: the Formatter protocol and what its two kinds share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from apt_serve.api.generation import ChoiceDelta, Job
from apt_serve.api.schemas.base import ResponseSchema
from apt_serve.api.schemas.common import Usage


class Formatter(Protocol):
    """Turns deltas into the bodies of one endpoint. One formatter serves one request; it may keep state."""

    def start(self, weight_version: str) -> None:
        """Take the version of the weights behind the answer; called once, before anything is formatted."""

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
    settings: str
    """The model's, spelled out."""
    weight_version: str = ""
    """Known with the first tokens."""
    system_fingerprint: str = ""
    """Changes with the settings and with the weights."""

    def started(self, weight_version: str) -> Envelope:
        """With what is known from the first tokens on."""
        digest = hashlib.sha256(f"{self.settings} {weight_version}".encode()).hexdigest()
        return replace(self, weight_version=weight_version, system_fingerprint=f"fp_{digest[:10]}")

    def fields(self, object_name: str) -> dict[str, Any]:
        """Keyword arguments for the body."""
        return {
            "id": self.job.id,
            "object": object_name,
            "created": self.job.created,
            "model": self.job.model,
            "system_fingerprint": self.system_fingerprint,
            "weight_version": self.weight_version,
        }


def present(**optional: Any) -> dict[str, Any]:
    """The keyword arguments that are not None: extensions that were not asked for stay out of the body."""
    return {name: value for name, value in optional.items() if value is not None}
