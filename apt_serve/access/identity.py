"""Who a request is for, whatever proved it: an API key, a token, or nothing on a server without access control."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a caller may do."""

    INFERENCE = "inference"
    """Generate, and list models."""
    JOBS = "jobs"
    """Files, batches and jobs."""
    ADMIN = "admin"
    """Keys, weights and models."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. Made by the authenticator alone; nothing a client sends about itself enters it unproven."""

    owner: str
    """Whom usage, limits, fairness and jobs are counted by: the tenant."""
    scopes: frozenset[Scope]
    key_id: str | None = None
    """The API key that proved it, which may be revoked while a request runs."""
    models: frozenset[str] | None = None
    """Models it may use; None: all."""
    tenant_class: str = "default"
    """One of the configured classes, whose limits hold for it and which metrics are labelled by."""
    expires_at: float | None = None
    """Unix seconds from which it proves nothing any more."""
    is_job: bool = False
    """Whether the server itself asks, for a batch or job of the owner."""

    def may(self, scope: Scope) -> bool:
        """Whether it has a scope."""
        return scope in self.scopes

    def may_use(self, model: str) -> bool:
        """Whether it may use a model."""
        return self.models is None or model in self.models


LOCAL = Identity("local", frozenset({Scope.INFERENCE, Scope.JOBS}))
"""Everybody, on a server without access control."""
